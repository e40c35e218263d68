"""Figure 2's MNIST with few latents, further than to 10^7 samples, and other settings of it.

python three_latents.py LATENTS SETTING SEED SAMPLES    prints samples, train and test bound

SETTING: "lecun" (figure 2's), "paper" (N(0, 0.01^2)), "mixed" (the latter for the encoder's first layer, the
former elsewhere), "sgvb_a" (lecun, the other estimator). A checkpoint beside this file goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vae_fast import Trainer, evaluation, presets
from vae_fast.experiments import curves

latents, setting, seed, samples = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
train, test = curves.load_data(["mnist"], None, None)[0]["mnist"]
paper = presets.paper_mnist(latents)
preset = paper.but({"init": "paper" if setting == "paper" else "lecun"})
if setting == "sgvb_a":
    preset = preset.but(estimator="sgvb_a")
model = preset.model(seed=seed)
if setting == "mixed":
    first = paper.model(seed=seed).encoder.hidden[0].weight
    with torch.no_grad():
        model.encoder.hidden[0].weight.copy_(first)
trainer = Trainer(model, **preset.trainer_options, seed=seed, device="cpu", engine="native")
checkpoint = Path(__file__).with_name(f"{latents}-{setting}-{seed}.safetensors")
if checkpoint.exists():
    trainer.resume(checkpoint)
for stop in curves.points_to(samples):
    since = trainer.samples_seen
    while trainer.samples_seen < stop:
        some = min(stop - trainer.samples_seen, curves.SAVE_EVERY)
        trainer.fit(train, max_samples=some, report_every=stop, checkpoint=checkpoint, progress=False)
    if stop > since:
        bound = evaluation.bound(trainer.model, test, seed=0).elbo
        print(f"{stop} {curves._online(trainer, since):.3f} {bound:.3f}", flush=True)
