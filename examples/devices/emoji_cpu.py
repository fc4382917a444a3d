"""A picture on a CPU: `emoji_cpu.py emoji.effuse "cat face" cat.png`. Needs numpy and onnxruntime.

Build it by `emoji_build.py cpu-avx512vnni emoji.effuse w8a8`, for Arm with cpu-arm64. To start
faster, and for small builds of ONNX Runtime: `effuse export emoji.effuse small.effuse`.
"""

import sys

from emoji_numpy import picture, write_png

import effuse

artifact, prompt, path = sys.argv[1:]
net = effuse.load(artifact, threads=2)
write_png(path, picture(net, prompt))
print(f"wrote {path}; ran {dict(net.session.steps)}")
