"""The parts of docs/accuracy.md about other material than the labelled trainings."""

from __future__ import annotations

from benchmarks.detection import before_loss, public
from benchmarks.detection import unusual as made_up
from benchmarks.detection.recording import recorded
from benchmarks.detection.rules import defaults, gradguard, with_updates
from benchmarks.detection.score import Score, score
from benchmarks.detection.sheet import Sheet
from benchmarks.detection.trainings.architectures import ARCHITECTURES, STEPS

SEEDS = (0, 1)


def published() -> str:
    """On histories that others have published."""
    by_history, by_ceiling, held_out = public.by_history(), public.by_ceiling(), public.cross_validated()
    return _PUBLISHED.format(
        number=len(public.histories()),
        figures=public.in_all(),
        by_history=by_history.markdown(),
        chosen=public.CHOSEN,
        by_ratio=public.by_ratio().markdown(),
        ratio_held_out=public.ratio_cross_validated().markdown(),
        by_ceiling=by_ceiling.markdown(),
        held_out=held_out.markdown(),
    )


def architectures() -> str:
    """On tiny networks of transformers."""
    rows = []
    for kind in ARCHITECTURES.values():
        recordings = [recorded(kind, seed, STEPS) for seed in SEEDS]
        losses = [f"{each.losses[0]:.2f} to {sum(each.losses[-20:]) / 20:.2f}" for each in recordings]
        found = [score(gradguard(make), recordings) for make in (defaults, with_updates)]
        rows.append([kind.name, *losses, *(_alarms(each) for each in found)])
    columns = ["architecture", *(f"loss, seed {seed}" for seed in SEEDS), "alarms by default", "with UpdateRatio"]
    return _ARCHITECTURES.format(steps=STEPS, table=Sheet("Architectures", columns, rows).markdown())


def _alarms(found: Score) -> str:
    return str(found.false_alarms)


def unusual() -> str:
    """On made-up histories of healthy trainings."""
    table = made_up.by_kind()
    return _UNUSUAL.format(
        number=len(made_up.UNUSUAL), steps=made_up.STEPS, seeds=len(made_up.SEEDS), table=table.markdown()
    )


def before_the_loss() -> str:
    """What sees trouble coming."""
    return _BEFORE.format(number=len(before_loss.DIVERGING), table=before_loss.by_candidate().markdown())


_PUBLISHED = """## Published histories

{number} histories of gradient norms from public repositories (`benchmarks/detection/histories`: numbers only, with
source and licence of each). A spike of so many times the usual norm, which is the median of the 64 points before, is
put in at 200 random points of each, after the first 64. "Flagged" are points of the history itself above the limit,
"alerts" those that would have been reported.

{figures} The aim was at most 0.1 in 1,000. With `ratio=5`, the default before, it was missed by two alerts, both of less
than six times the usual norm. What is left are single steps of 7 to 15 times it, in three trainings of GPT-2 and one of
reinforcement learning.

{by_history}

The detector at other ratios, everything else at its default; the ceiling of its limit is a multiple of the ratio:

{by_ratio}

The default was chosen by these histories: it is the lowest ratio with the fewest alerts, of those that find 99 % of the
spikes of 30 times in each history. For each source, what the ratio that is best so on all *other* sources does on it:

{ratio_held_out}

Ceilings for the limit, once there are 64 norms (here flagged points stay in the window, and points are counted, not
alerts):

{by_ceiling}

The one in use, "{chosen}", is not the best on these histories: twice the second largest norm finds more at no more
flags. It was
taken because three times it, tried first and without waiting for 64 norms, raised alarms on healthy small trainings
(`mlp_momentum`, `curriculum`, `patchtst`). For each source, what the ceiling that is best on all *other* sources does on it:

{held_out}"""

_ARCHITECTURES = """## Healthy architectures

Networks of `transformers`, tiny, with random weights, {steps} steps each on characters, digits and noisy waves, with
AdamW at 0.001. Each alarm would be a false one. The rule for single parameters as it was before raised alarms
on `bert` (both seeds) and `vit` (one): embeddings whose gradient rose up to 62 times while the network learned to use
them.

{table}"""

_UNUSUAL = """## Unusual histories

{number} made-up histories of healthy trainings (`benchmarks/detection/unusual.py`), {steps} steps and {seeds} seeds each,
twelve parameters with noise of their own. How many lines a guard with its defaults may tell was written before the first
run. In that run five kinds got more: the cyclic rates (one to four lines about a norm that "keeps growing"; growth since has
to end above the norms of the 192 steps before), the embedding (one or two, since a module counted as dead after twenty
steps, however often it had rested before), the heavy tails (none to two), the penalty (four) and the network that leaves
zero (two). Now:

{table}

What is left of these is true of the norm, and needless:

- Heavy tails: single steps of more than twelve times the usual norm. See `single_samples` below.
- A penalty that is added at every 16th step stands out by twenty times, since the other steps hardly vary. It is told four
  times, and then no more, but a guard that skips would skip each of them: pass `Explosion(ratio=...)` above what the penalty
  does, or `patience=2`, which single steps don't reach.
- In some seeds the embedding rests for longer than its first uses let expect.
- A norm that rises from 1e-8 by a fifth at each step while the loss stands still can't be told from one that falls apart."""

_BEFORE = """## Before the loss

Does anything see a divergence before it shows? {number} kinds of training that fall apart over many steps, three seeds
each. A candidate's threshold is its largest value in any healthy run after step 16 (three seeds of the healthy kinds,
those of the second test half apart, and the architectures above), so that it raises no false alarm here. "Steps before
ours" is the median lead over the first alarm of the detectors that are on by default, in the runs in which the
candidate finds something; "before the loss" that over the step at which the median of 8 losses rises above its range.
Negative: it comes later.

{table}

None of the figures of gradients alone comes before the detectors that are there, let alone before the loss: none was
added. Second moments are those of a whole matrix here, not of single elements as in the papers, and no run is long
enough for them to go stale (thousands of steps), so this says nothing against them there. Embeddings are left out of
the ratios, since their rare rows leap in health. What does lead, by ten steps over our other detectors and not over the
loss, is how far updates move the weights: the figure of `UpdateRatio`."""
