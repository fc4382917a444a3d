"""A picture by XNNPACK: `emoji_xnnpack.py emoji.effuse "cat face" cat.png`.

Build it by `emoji_build.py xnnpack emoji.effuse w8a8`. Needs numpy and a build of ONNX Runtime with
`--use_xnnpack`; Android's and iOS's packages have it. Where it is absent, as in the wheels of
onnxruntime, this script asks for the CPU instead, which effuse does not do unasked.
"""

import sys

from emoji_numpy import picture, write_png

import effuse

artifact, prompt, path = sys.argv[1:]
try:
    made = picture(effuse.load(artifact), prompt)
except effuse.EffuseError as error:
    print(error, file=sys.stderr)
    made = picture(effuse.load(artifact, providers=["CPUExecutionProvider"]), prompt)
write_png(path, made)
