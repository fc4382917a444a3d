"""Values read out of tensors in forward: recorded on the examples, static in the program."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from effuse.backends.reference import session
from effuse.capture import capture
from effuse.capture_values import OPEN, recorded
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


class Counting(nn.Module):
    """Cuts the latent by a number that is written into a part of a tensor, in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = getattr(self, way)

    def item(self, numbers: torch.Tensor, number: torch.Tensor) -> int:
        numbers[0] = number
        return int(numbers[0])

    def view(self, numbers: torch.Tensor, number: torch.Tensor) -> int:
        numbers[:1].copy_(number.view(1))
        return int(numbers[0])

    def twice(self, numbers: torch.Tensor, number: torch.Tensor) -> int:
        numbers.view(2, 1)[0, 0] = number
        return int(numbers[0])

    def sibling(self, numbers: torch.Tensor, number: torch.Tensor) -> int:
        one, other = numbers[:1], numbers.detach()[0]
        one.add_(number)
        return int(other)

    def out(self, numbers: torch.Tensor, number: torch.Tensor) -> int:
        torch.mul(number.view(1), 1, out=numbers[:1])
        return int(numbers[0])

    def forward(self, sample: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        number = self.way(torch.zeros(2, dtype=torch.long), mask.sum())
        return sample[:, :number].sum(dim=1)


WRITES = ["item", "view", "twice", "sibling", "out"]


@pytest.mark.parametrize("way", WRITES)
def test_what_is_read_from_memory_follows_from_what_was_written_into_it(way: str):
    given = {"sample": torch.randn(2, 4), "mask": torch.tensor([1, 1, 0, 0])}
    program = capture(Counting(way).eval(), given)
    assert {item.name: item.role for item in program.inputs}["mask"] is Role.STATIC
    with torch.no_grad():
        assert torch.equal(run_program(program, given)[0], Counting(way)(**given))


@pytest.mark.parametrize("way", WRITES)
def test_what_the_latent_wrote_into_memory_is_not_recorded(way: str):
    model = Counting(way)
    x = torch.tensor([[1.0, 2.0, -3.0, -4.0]])
    given = {"sample": x, "mask": torch.zeros(4).long()}
    record = recorded(model, given, ["sample"])
    assert record.labels == {"mask"} and record.values == [0]
    record = recorded(model, given, ["sample", "mask"])
    assert not record.labels and record.values == [OPEN]
    with pytest.raises(CaptureError, match="depends on the data"):
        capture(model.eval(), given, roles={"mask": Role.LATENT})


def test_each_number_of_a_list_that_follows_from_the_latent_is_open():
    class Listing(nn.Module):
        def forward(self, sample: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            first, second = (sample > 0).sum(dim=1).tolist()
            return sample * first + second * mask.sum().item()

    given = {"sample": torch.ones(2, 4), "mask": torch.ones(4)}
    assert recorded(Listing(), given, ["sample"]).values == [OPEN, OPEN, 4.0]


def test_the_end_of_a_slice_that_the_latent_says_is_not_recorded():
    class Ending(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            places = torch.zeros(sample.numel(), dtype=torch.bool)
            places[: (sample > 0).sum()] = True
            return sample + places.view_as(sample)

    with pytest.raises(CaptureError, match="depends on the data"):
        capture(Ending().eval(), {"sample": torch.ones(2, 4)})
