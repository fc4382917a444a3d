"""A picture on an NVIDIA GPU: `emoji_cuda.py emoji.effuse "cat face" cat.png`.

Build it by `emoji_build.py cuda-fp16 emoji.effuse`, with w4a16 behind it or without; integer
convolutions have no CUDA kernels in ONNX Runtime. Needs numpy and `pip install onnxruntime-gpu`.
"""

import sys

from emoji_numpy import picture, write_png

import effuse

artifact, prompt, path = sys.argv[1:]
# The providers are the artifact's own; these would choose another GPU and let others run the rest.
# providers = [("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]
net = effuse.load(artifact)
write_png(path, picture(net, prompt))
