"""Wrong reuse never happens: random calls of a cached program, against an oracle that knows all.

The oracle is told which picture each call belongs to. What the plan says is right at a step if that
very picture's own calls made all that the step reads; the full variant is right at any step.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import nn

from effuse.backends.reference import session
from effuse.capture import capture
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist
from effuse.plan import FORECAST_INPUT
from effuse.program import run_parts
from effuse.trajectory import KEPT_TRAJECTORIES, KNOWN_TRAJECTORIES, likeness

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

STEPS = 9
TIMES = tuple(float(time) for time in range(10 * STEPS, 0, -10))
SPEED = math.pi / 2 / STEPS  # how far a latent turns from its noise to its picture in a step
EXAMPLES = 4  # of each property and program
EMPTY = 9  # the prompt of guidance's unconditional half
SIZES = {"batch": (1, 4), "height": (4, 16), "width": (4, 16)}

CACHES = {
    "residual, order 1": Cache(mode="residual", interval=3, order=1, warmup=2),
    "blocks, order 0": Cache(mode="block", interval=2, order=0, warmup=1),
    "blocks, order 2": Cache(mode="block", schedule=(0, 1, 2, 6), order=2),
    "the output": Cache(at=("leave",), interval=3, order=0, warmup=1),
}


class Tiny(nn.Module):
    """Three residual blocks of 1 x 1 convolutions, gated by timestep and prompt."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(5, 5, 1) for _ in range(3))
        self.label = nn.Linear(3, 5)

    def forward(self, sample, timestep, prompt):
        phase = timestep.float().reshape(-1, 1) * torch.arange(1, 6) / 50
        gate = (torch.sin(phase) + self.label(prompt))[:, :, None, None]
        h = self.enter(sample)
        for block in self.blocks:
            h = h + gate * torch.tanh(block(h))
        return self.leave(h)


def build(cache):
    torch.manual_seed(0)
    net = Tiny().eval().requires_grad_(False)
    inputs = {"sample": randn(1, 2, 3, 8, 8), "timestep": torch.tensor(TIMES[1])}
    inputs["prompt"] = randn(2, 2, 3)
    captured = capture(net, inputs, timesteps=TIMES, dynamic=SIZES)
    return run_passes(captured, (Canonicalize(), Hoist(), cache))


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def programs():
    return {name: build(cache) for name, cache in CACHES.items()}


# ---- pictures, and the calls that sampling them makes -----------------------------------------


@dataclass(frozen=True)
class Picture:
    """How one picture (or batch of them) is sampled."""

    number: int
    prompt: int = 0
    noise: int = 0
    image: int = 0
    speed: float = 1.0  # more guidance moves a latent farther
    sampler: str = "ddim"  # ddim, ancestral, heun, or noise: other latents at each call
    guidance: str = "none"  # none, one batch, two calls
    batch: int = 1
    width: int = 8
    start: int = 0
    stop: int = STEPS  # earlier: aborted
    skipped: int | None = None
    repeated: int | None = None

    def latent(self, step, nudge=0.0):
        """Turns from the noise to the image; ancestral samplers stir as they go."""
        shape = (self.batch, 3, 8, self.width)
        if self.sampler == "noise":
            return randn(hash((self.number, step, nudge)) % 2**31, *shape)
        angle = min(self.speed * SPEED * (step + nudge), math.pi / 2)
        noise = randn(self.noise, *shape)
        for stir in range(step if self.sampler == "ancestral" else 0):
            noise = 0.9 * noise + math.sqrt(1 - 0.81) * randn(1000 * self.number + stir, *shape)
        return math.cos(angle) * noise + math.sin(angle) * randn(77 + self.image, *shape)

    def calls(self):
        """(branch, step, latent, prompt) in order."""
        prompts = {"": self.prompts(self.prompt)}
        if self.guidance == "two calls":
            prompts["free"] = self.prompts(EMPTY)
        for step in range(self.start, self.stop):
            if step == self.skipped:
                continue
            latents = [self.latent(step)]
            if self.sampler == "heun" and step > self.start:
                latents.insert(0, self.latent(step, nudge=0.1))
            latents += [latents[-1]] * (step == self.repeated)
            for latent in latents:
                for branch, prompt in prompts.items():
                    if self.guidance == "one batch":
                        both = torch.cat([self.prompts(EMPTY), prompt])
                        yield branch, step, torch.cat([latent, latent]), both
                    else:
                        yield branch, step, latent.clone(), prompt

    def prompts(self, number):
        return randn(500 + number, 1, 3).expand(self.batch, 3).contiguous()


@dataclass(frozen=True)
class Call:
    """One call of the network, and whose it is."""

    owner: tuple[int, str]
    step: int
    latent: torch.Tensor
    prompt: torch.Tensor

    @property
    def values(self):
        time = torch.tensor(TIMES[self.step])
        return {"sample": self.latent, "timestep": time, "prompt": self.prompt}


def calls_of(picture):
    return [Call((picture.number, branch), *rest) for branch, *rest in picture.calls()]


def merged(pictures, turns=()):
    """All pictures' calls: by `turns`, the number of whose turn it is; then in order."""
    queues = [calls_of(picture) for picture in pictures]
    found = []
    for turn in turns:
        waiting = [queue for queue in queues if queue]
        if waiting:
            found.append(waiting[turn % len(waiting)].pop(0))
    return found + [call for queue in queues for call in queue]


def in_turns(pictures):
    """One call of each picture after another."""
    queues = [calls_of(picture) for picture in pictures]
    return [call for row in itertools.zip_longest(*queues) for call in row if call]


class Oracle:
    """What may come out of each call, by its true owner's own calls alone."""

    def __init__(self, program):
        self.program = program
        self.filled = defaultdict(list)  # by owner and step: what the slots would hold

    def planned(self, call):
        """The outputs that the plan allows at this step; nothing if it needs other calls' fills."""
        entry = self.program.plan.at(call.step)
        if entry.reads:
            return [self.reading(call, entry, chosen) for chosen in self.histories(call)]
        env = run_parts(self.program, call.values)
        self.filled[call.owner, call.step].append({slot: env[slot] for slot in entry.fills})
        return [env[self.program.outputs[0]]]

    def full(self, call):
        """What the default variant gives."""
        return run_parts(self.program, call.values)[self.program.outputs[0]]

    def histories(self, call):
        """The fills that the step reads, latest first; a step evaluated twice filled twice."""
        sources = self.program.plan.at(call.step).sources
        return itertools.product(*(self.filled[call.owner, step] for step in sources))

    def reading(self, call, entry, chosen):
        given = dict(call.values)
        for slot in self.program.plan.slots:
            values = [fills[slot.name] for fills in chosen]
            values += values[-1:] * (slot.depth - len(values))
            given |= zip(slot.past, values, strict=True)
        if entry.weights:
            given[FORECAST_INPUT] = torch.tensor(entry.weights)
        return run_parts(self.program, given, variant=entry.variant)[self.program.outputs[0]]


def check(program, calls):
    """Run the calls in one Session; return for each whether its output was the planned one."""
    oracle, model = Oracle(program), session(program)
    kept = []
    for number, call in enumerate(calls):
        found = model(**call.values)
        as_planned = any(torch.equal(found, each) for each in oracle.planned(call))
        assert as_planned or torch.equal(found, oracle.full(call)), f"call {number}: {call.step}"
        kept.append(as_planned)
        found.zero_()  # the output is the caller's, and so is the latent
        call.latent.fill_(math.nan)
    assert sum(bool(each.slots) for each in model.trajectories) <= KEPT_TRAJECTORIES
    assert len(model.trajectories) <= KNOWN_TRAJECTORIES
    return kept


def run(examples):
    return settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- wrong reuse never happens ----------------------------------------------------------------


@st.composite
def some_pictures(draw):
    """Up to four, alike as far as pictures can be that start at step 0 and miss none."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        picture = Picture(
            number,
            prompt=draw(st.sampled_from([0, 0, 1, EMPTY])),
            noise=draw(st.integers(0, 1)),
            image=draw(st.integers(0, 1)),
            speed=draw(st.sampled_from([1.0, 1.0, 0.6, 1.4])),
            sampler=draw(st.sampled_from(["ddim", "ddim", "ancestral", "heun", "noise"])),
            guidance=draw(st.sampled_from(["none", "none", "one batch", "two calls"])),
            batch=draw(st.sampled_from([1, 1, 2])),
            width=draw(st.sampled_from([8, 8, 12])),
            stop=draw(st.sampled_from([STEPS, STEPS, 1, 3, 6])),
            repeated=draw(st.sampled_from([None, None, 0, 2, 5])),
        )
        start = draw(st.sampled_from([0, 0, 0, 1, 4]))
        skipped = draw(st.sampled_from([None, None, None, 2, 5]))
        if start or skipped is not None:  # a picture of its own
            own = {"noise": 10 + number, "image": 10 + number}
            picture = replace(picture, start=start, skipped=skipped, **own)
        found.append(picture)
    return found


@pytest.mark.parametrize("name", CACHES)
@run(EXAMPLES)
@given(pictures=some_pictures(), turns=st.lists(st.integers(0, 3), max_size=40))
def test_each_call_gives_what_its_own_picture_plans_or_the_full_step(
    programs, name, pictures, turns
):
    note(f"{pictures}")
    check(programs[name], merged(pictures, turns))


@run(EXAMPLES)
@given(pictures=some_pictures())
def test_in_turns_as_well(programs, pictures):
    note(f"{pictures}")
    check(programs["residual, order 1"], in_turns(pictures))


# ---- no needless full steps -------------------------------------------------------------------

PLAIN = [
    Picture(1, sampler=sampler, guidance=guidance, batch=batch)
    for sampler in ("ddim", "ancestral", "heun")
    for guidance, batch in (("none", 1), ("one batch", 2), ("two calls", 1))
]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("picture", PLAIN, ids=lambda each: f"{each.sampler}, {each.guidance}")
def test_a_picture_alone_runs_as_planned(programs, name, picture):
    assert all(check(programs[name], calls_of(picture)))


@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("guidance", ["none", "one batch", "two calls"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_two_pictures_in_turns_run_as_planned(programs, sampler, guidance, prompt):
    one = Picture(1, noise=1, image=1, sampler=sampler, guidance=guidance)
    other = replace(one, number=2, noise=2, image=2, prompt=prompt)
    for program in programs.values():
        assert all(check(program, in_turns([one, other])))


def test_many_pictures_one_after_another(programs):
    pictures = [Picture(number, noise=number, image=number) for number in range(6)]
    aborted = [replace(each, stop=4) for each in pictures[::2]]
    for program in programs.values():
        assert all(check(program, merged([*aborted, *pictures])))


def test_another_size_or_batch_starts_anew(programs):
    program = programs["residual, order 1"]
    pictures = [Picture(1), Picture(2, batch=2), Picture(3, width=12)]
    assert all(check(program, in_turns(pictures)))


def test_a_picture_from_the_middle_waits_for_its_own_fills(programs):
    program = programs["residual, order 1"]
    entries = [program.plan.at(step) for step in range(4, STEPS)]
    own = [set(entry.sources) <= set(range(4, STEPS)) for entry in entries]
    assert check(program, calls_of(Picture(1, start=4))) == own


# ---- what could be one picture as well as another ---------------------------------------------


def test_one_seed_with_more_guidance_beside_it(programs):
    """The faster one's last latent is closer to the slower one's next than its own."""
    slow, fast = Picture(1, speed=0.5), Picture(2, speed=1.0)
    for program in programs.values():
        check(program, in_turns([slow, fast]))
        check(program, in_turns([fast, slow]))
        check(program, merged([fast, slow], [0] * 4 + [1] * 4))
        check(program, merged([replace(fast, stop=4), slow]))


def test_more_pictures_than_slots_are_kept_for(programs):
    """One whose slots are gone is not taken for a similar one whose slots are there."""
    pictures = [Picture(number, noise=number, image=0) for number in range(7)]
    assert likeness(*(each.latent(STEPS - 1).numpy() for each in pictures[:2])) > 0.9
    for program in programs.values():
        check(program, in_turns(pictures))


def test_a_picture_that_became_nan_is_like_no_other(programs):
    program = programs["blocks, order 0"]
    broken, whole = calls_of(Picture(1, stop=3)), calls_of(Picture(2, noise=1, image=1))
    broken[2].latent[0, 0, 0, 0] = math.nan
    oracle, model = Oracle(program), session(program)
    for call in broken:
        model(**call.values)
    for call in whole:
        assert torch.equal(model(**call.values), oracle.planned(call)[0])


def test_likeness():
    a, b = randn(1, 2, 3, 8, 8).numpy(), randn(2, 2, 3, 8, 8).numpy()
    assert likeness(a, 3 * a + 1) == pytest.approx(1) and abs(likeness(a, b)) < 0.4
    assert likeness(a, np.stack([a[0], b[1]])) < 0.4  # the least of the rows
    assert likeness(a, a * np.nan) == likeness(a * np.inf, a) == 0.0
    assert likeness(np.zeros_like(a), np.zeros_like(a)) == 0.0


# ---- what is kept -----------------------------------------------------------------------------


def kept_steps(model):
    """For each trajectory the steps that its slots were filled at, latest first."""
    return [{tuple(kept.step for kept in values) for values in each.slots.values()}
            for each in model.trajectories]  # fmt: skip


def test_slots_are_filled_only_as_planned(programs):
    for program in programs.values():
        model = session(program)
        depth = max(slot.depth for slot in program.plan.slots)
        filled = []
        for call in calls_of(Picture(1))[:-1]:
            model(**call.values)
            filled = [call.step] * bool(program.plan.at(call.step).fills) + filled
            assert kept_steps(model) == [{tuple(filled[:depth])}]


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun"])
@pytest.mark.parametrize("guidance", ["none", "two calls"])
def test_nothing_is_kept_after_the_last_step(programs, sampler, guidance):
    for program in programs.values():
        model = session(program)
        for call in calls_of(Picture(1, sampler=sampler, guidance=guidance)):
            model(**call.values)
        assert not len(model.trajectories)


def test_what_is_kept_is_bounded(programs):
    model = session(programs["residual, order 1"])
    for number in range(2 * KNOWN_TRAJECTORIES):
        for call in calls_of(Picture(number, noise=number, image=number, stop=3)):
            model(**call.values)
    assert sum(bool(each.slots) for each in model.trajectories) == KEPT_TRAJECTORIES
    assert len(model.trajectories) == KNOWN_TRAJECTORIES


def test_reset_forgets(programs):
    program = programs["residual, order 1"]
    model = session(program)
    calls = calls_of(Picture(1))
    for call in calls[:3]:
        model(**call.values)
    model.reset()
    assert not len(model.trajectories)
    before = model.steps["full"]
    model(**calls[3].values)
    assert program.plan.at(3).reads and model.steps["full"] == before + 1


def test_variants_run_as_often_as_planned(programs):
    for program in programs.values():
        model = session(program)
        for call in calls_of(Picture(1)):
            model(**call.values)
        assert model.steps == Counter(step.variant for step in program.plan.steps)


def test_the_forecast_has_the_plans_weights(programs):
    seen = []
    program = programs["blocks, order 2"]

    def enter(part, values):
        if FORECAST_INPUT in values:
            seen.append(values[FORECAST_INPUT].tolist())

    model = session(program, enter=enter)
    for call in calls_of(Picture(1)):
        model(**call.values)
    weights = [step.weights for step in program.plan.steps if step.reads]
    assert seen == [pytest.approx(each) for each in weights]


def test_a_call_that_fails_leaves_nothing_wrong_behind(programs):
    program = programs["residual, order 1"]
    fail = []

    def enter(part, values):
        if fail:
            raise KeyboardInterrupt

    model, oracle = session(program, enter=enter), Oracle(program)
    for call in calls_of(Picture(1)):
        if call.step == 3:
            fail.append(True)
            with pytest.raises(KeyboardInterrupt):
                model(**call.values)
            fail.clear()
        found = model(**call.values)
        allowed = [oracle.full(call), *oracle.planned(call)]
        assert any(torch.equal(found, each) for each in allowed)
