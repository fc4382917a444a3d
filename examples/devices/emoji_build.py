"""On a machine with torch: the text-to-emoji network for a device, `TARGET OUT [PRESET]`.

python examples/devices/emoji_build.py cuda-fp16 emoji.effuse
python examples/devices/emoji_build.py qnn emoji.effuse w8a8
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for the pipeline beside this folder

from emoji import EmojiPipeline, names

import effuse
from effuse.config import preset

STEPS, SEED = 10, 1234


def main(target: str, out: str, passes: str = "exact") -> None:
    """Compile one prompt with guidance, DDIM-10, and calibrate on prompts of the network's own."""
    pipe = EmojiPipeline.open()
    pipe.scheduler.set_timesteps(STEPS)

    def calibrate(model: object) -> None:
        pipe.unet = model
        for prompt in names()[:4]:
            pipe.latents([prompt], SEED)

    config = effuse.Config(passes=preset(passes), target=target)
    compiled = effuse.compile(
        pipe.unet, config, inputs=pipe.example_inputs(prompts=1), schedule=pipe.scheduler,
        calibration=calibrate,
    )  # fmt: skip
    print(f"{compiled.save(out)}: {compiled.size / 1e6:.2f} MB, {compiled.manifest['parity']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
