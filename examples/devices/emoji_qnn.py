"""A picture on a Snapdragon's Hexagon processor: `emoji_qnn.py emoji.effuse "cat face" cat.png`.

Build it by `emoji_build.py qnn emoji.effuse w8a8`: sizes are fixed, operators standard; float
layers run in float16. Needs numpy and `pip install onnxruntime onnxruntime-qnn` (for Linux and
Windows on Arm), whose library effuse registers with ONNX Runtime.
"""

import sys

from emoji_numpy import picture, write_png

import effuse

artifact, prompt, path = sys.argv[1:]
net = effuse.load(artifact)  # the first session compiles for the chip, which takes a while
write_png(path, picture(net, prompt))
