"""Which samples make up each optimizer step: a function of the seed alone, however the step is split.

As in LLaVA's training a step's samples are either all with images or all without (text-only steps are much shorter),
drawn at random, and within the step samples of similar length go together, so that little is spent on padding.
"""

from __future__ import annotations

import numpy as np

from vzip.errors import ConfigError


def draw_steps(
    lengths: np.ndarray,
    has_images: np.ndarray,
    samples_per_step: int,
    seed: int,
    epoch: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Draws the steps of one epoch.

    Each sample is in at most one step; the last ones that make no whole step are left out. Groups are drawn whole and
    stand one after the other, each as long as its longest sample, and one that a step has no more room for goes on in
    another step: every step has as many samples as without them.

    Args:
        lengths: ``[samples]``, any measure.
        has_images: bool ``[samples]``.
        samples_per_step: over all processes and accumulated batches.
        seed, epoch: decide the draw.
        groups: a number for each sample, the same for those that are to stand side by side; None: each by itself.

    Returns:
        int64 ``[steps, samples_per_step]``, each step's samples from long to short.

    Raises:
        ConfigError: fewer samples than a single step needs.
    """
    if len(lengths) < samples_per_step:
        raise ConfigError(
            f"{len(lengths)} training samples are fewer than one step's train.samples_per_step={samples_per_step}:"
            " choose a larger data.fraction or a smaller train.samples_per_step."
        )
    if groups is not None:
        _, groups = np.unique(groups, return_inverse=True)
        longest = np.zeros(len(groups), dtype=np.int64)
        np.maximum.at(longest, groups, lengths)
        lengths = longest[groups]
    rng = np.random.RandomState([seed, epoch])  # its stream is frozen: the same draw on every machine
    whole: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for group in (np.flatnonzero(has_images), np.flatnonzero(~has_images)):
        drawn = rng.permutation(group) if groups is None else _permuted(group, groups, rng)
        count = len(drawn) // samples_per_step * samples_per_step
        whole.append(drawn[:count])
        rest.append(drawn[count:])
    mixed = rng.permutation(np.concatenate(rest))
    whole.append(mixed[: len(mixed) // samples_per_step * samples_per_step])
    steps = np.concatenate(whole).reshape(-1, samples_per_step)
    steps = steps[rng.permutation(len(steps))]
    by_length = np.argsort(-np.asarray(lengths, dtype=np.int64)[steps], axis=1, kind="stable")
    return np.take_along_axis(steps, by_length, axis=1).astype(np.int64)


def _permuted(samples: np.ndarray, groups: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """The samples, those of a group side by side in their order, the groups at random."""
    _, group_of = np.unique(groups[samples], return_inverse=True)
    place = np.argsort(rng.permutation(group_of.max(initial=-1) + 1))
    return samples[np.argsort(place[group_of], kind="stable")]


def split_step(step: np.ndarray, batch_size: int, rank: int, num_processes: int) -> list[np.ndarray]:
    """One process's batches of a step, in order.

    Neighbours in length work side by side: batch 0 of all processes holds the longest samples, and so on.

    Args:
        step: a row of ``draw_steps``; its length must be a multiple of ``batch_size * num_processes``.
        batch_size: samples a process handles at once.
        rank, num_processes: which of how many processes.
    """
    batches = step.reshape(-1, batch_size)
    return list(batches[rank::num_processes])
