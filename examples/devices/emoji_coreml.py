"""A picture by Core ML on a Mac: `emoji_coreml.py emoji.effuse "cat face" cat.png`.

Build it by `emoji_build.py coreml-fp16 emoji.effuse`: Core ML's provider computes nothing in 8
bits. Needs numpy and `pip install onnxruntime` on macOS. On iOS, `effuse export` gives .ort files
for the pod onnxruntime-objc; the plan in manifest.json says which of them runs at which step.
"""

import sys

from emoji_numpy import picture, write_png

import effuse

artifact, prompt, path = sys.argv[1:]
net = effuse.load(artifact)
write_png(path, picture(net, prompt))
