"""Values read out of tensors in forward: recorded on the examples, static in the program."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from effuse.backends.reference import session
from effuse.capture import capture
from effuse.errors import CaptureError, InputError
from effuse.plan import Role
from effuse.program import run_program

# pytest's log capture makes torch.export write its trace of every symbol, at ten times the time.
logging.getLogger("torch.__trace").disabled = True


class Reading(nn.Module):
    """Picks the prompt's tokens by a mask, and repeats rows by lengths, as video networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, sample: torch.Tensor, prompt: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        longest = int(mask.sum(dim=1).max().item())
        kept = prompt[:, :longest]
        picked = prompt[mask.bool()].mean(dim=0)
        lengths = mask.sum(dim=1).tolist()
        parts = [kept[row, :length].sum(dim=0) for row, length in enumerate(lengths)]
        if mask.all():
            return self.layer(sample)
        return self.layer(sample) + torch.stack(parts) + picked


def inputs() -> dict[str, torch.Tensor]:
    """Two prompts of three and two tokens of four."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    return {"sample": torch.randn(2, 4), "prompt": torch.randn(2, 4, 4), "mask": mask}


def test_what_is_read_from_an_input_is_a_part_of_the_program():
    given, model = inputs(), Reading().eval()
    program = capture(model, given)
    roles = {item.name: item.role for item in program.inputs}
    assert roles == {"sample": Role.LATENT, "prompt": Role.PROMPT, "mask": Role.STATIC}
    other = given | {"sample": torch.randn(2, 4), "prompt": torch.randn(2, 4, 4)}
    with torch.no_grad():
        assert torch.equal(run_program(program, other)[0], model(**other))


def test_another_value_of_what_was_read_is_refused():
    given = inputs()
    run = session(capture(Reading().eval(), given))
    run(**given)
    with pytest.raises(InputError, match="its role is static"):
        run(**(given | {"mask": torch.ones_like(given["mask"])}))


def test_the_latent_may_not_choose_the_way():
    class Choosing(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample * 2 if sample.mean() > 0 else sample

    with pytest.raises(CaptureError, match="depends on the data"):
        capture(Choosing().eval(), {"sample": torch.ones(2, 4)})


def test_writing_where_a_mask_is_true():
    class Writing(nn.Module):
        def forward(self, sample: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            changed = sample.clone()
            changed[mask] = 0.0
            return changed * 2 + mask.nonzero().shape[0]

    mask = torch.tensor([True, False, True])
    model, x = Writing().eval(), torch.randn(3, 4)
    program = capture(model, {"sample": x, "mask": mask})
    other = {"sample": torch.randn(3, 4), "mask": mask}
    assert torch.equal(run_program(program, other)[0], model(**other))


class Cutting(nn.Module):
    """Opens a mask row by row up to an end that is a tensor, as packed video frames do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, sample: torch.Tensor, prompt: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        ends = mask.sum(dim=1)
        open_places = torch.zeros(2, 6, dtype=torch.bool)
        for row in range(2):
            open_places[row, 2 : 2 + ends[row]] = True
            open_places[row, ends[row] : 5 : ends[1]] = True
        kept = prompt[:, : ends[0], mask[1].bool()]
        return self.layer(sample) + open_places.sum(dim=1, keepdim=True) + kept.mean(dim=(1, 2))


def test_the_ends_of_slices_may_be_read_from_an_input():
    given, model = inputs() | {"prompt": torch.randn(2, 4, 4, 4)}, Cutting().eval()
    program = capture(model, given)
    assert {item.name: item.role for item in program.inputs}["mask"] is Role.STATIC
    other = given | {"sample": torch.randn(2, 4), "prompt": torch.randn(2, 4, 4, 4)}
    with torch.no_grad():
        assert torch.equal(run_program(program, other)[0], model(**other))


def test_the_end_of_a_slice_that_the_latent_says_is_not_recorded():
    class Ending(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            places = torch.zeros(sample.numel(), dtype=torch.bool)
            places[: (sample > 0).sum()] = True
            return sample + places.view_as(sample)

    with pytest.raises(CaptureError, match="depends on the data"):
        capture(Ending().eval(), {"sample": torch.ones(2, 4)})
