from emoji import EmojiPipeline

import effuse

pipe = EmojiPipeline.open()  # any diffusers pipeline
pipe.scheduler.set_timesteps(50)
pipe.unet = effuse.compile(
    pipe.unet, "w8a8", inputs=pipe.example_inputs(prompts=2), schedule=pipe.scheduler
)
pipe(["cat face", "red heart"], steps=50).images[0].save("cat.png")
pipe.unet.save("unet.effuse")  # effuse.load("unet.effuse") needs no torch
