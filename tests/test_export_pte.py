"""ExecuTorch: what has no form there, and the same numbers from .pte files where it is."""

import numpy as np
import pytest
import torch
from torch import nn

import effuse
from effuse import export_pte
from effuse.errors import ConfigError
from effuse.passes import Cache, Hoist, Quantize

TIMES = [800, 600, 400, 200]


class Net(nn.Module):
    """A denoiser with a long skip, attention and a prompt."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)
        self.norm, self.middle = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)
        self.query, self.prompt = nn.Linear(width, width), nn.Linear(4, width)
        self.up, self.last = nn.Conv2d(2 * width, width, 1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        skip = torch.relu(self.first(sample) + torch.sin(timestep * 0.01))
        h = self.middle(nn.functional.silu(self.norm(self.down(skip))))
        tokens, keys = h.flatten(2).transpose(1, 2), self.prompt(encoder_hidden_states)
        seen = nn.functional.scaled_dot_product_attention(
            self.query(tokens)[:, None], keys[:, None], keys[:, None]
        )
        h = h + seen[:, 0].transpose(1, 2).reshape(h.shape)
        h = nn.functional.interpolate(h, scale_factor=2.0)
        y = self.last(torch.relu(self.up(torch.cat([h, skip], 1))))
        return {"sample": y} if return_dict else (y,)


def built(folder, *passes, batch=1, **options):
    given = {"sample": torch.ones(batch, 3, 8, 8), "timestep": torch.tensor(600),
             "encoder_hidden_states": torch.ones(batch, 2, 4), "return_dict": False}  # fmt: skip
    config = effuse.Config(passes=passes, **{"backend": "reference", **options})
    compiled = effuse.compile(Net().eval(), config, inputs=given, schedule=TIMES, progress=False)
    return compiled.save(folder / "net.effuse")


def sampled(net):
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for time in TIMES:
        x = x - 0.1 * net(x, time, encoder_hidden_states=torch.ones(1, 2, 4))["sample"]
    return x.numpy()


def test_what_has_no_form_is_refused(tmp_path):
    goal = tmp_path / "out.effuse"
    with pytest.raises(ConfigError, match=r"backend 'onnx'; \.pte files are made from"):
        export_pte.export(built(tmp_path, Hoist(), backend="onnx"), goal)
    with pytest.raises(ConfigError, match=r"no kernels for .*quantize.*; leave Quantize out"):
        export_pte.export(built(tmp_path, Hoist(), Quantize("w8a8", min_sqnr_db=0)), goal)
    with pytest.raises(ConfigError, match="sizes are left open: batch"):
        export_pte.export(built(tmp_path, Hoist(), batch=2, dynamic={"batch": (1, 4)}), goal)
    assert not goal.exists()


def test_pte_files_compute_the_same(tmp_path):
    pytest.importorskip("executorch.exir")
    source = built(tmp_path, Hoist(), Cache(interval=2, warmup=1))
    files = export_pte.export(source, tmp_path / "small.effuse")
    assert {"full.pte", "reuse.pte", "prompt.pte", "manifest.json"} <= set(files)
    loaded = effuse.load(tmp_path / "small.effuse")
    np.testing.assert_allclose(sampled(loaded), sampled(effuse.load(source)), atol=1e-5)
    assert loaded.session.steps == {"full": 2, "reuse": 2}
