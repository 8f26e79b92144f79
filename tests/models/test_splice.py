"""Where visual tokens go: placeholders, padding, labels, positions, and every way they can be wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vzip.errors import PromptError
from vzip.models.splice import plan_splice, splice

IMAGE = 9
EXPANDED = 4  # placeholders the processor would write for an image


def run(rows, num_images, masks=None, labels=None, lengths=None, padding_side=None):
    """Splices images of 2 tokens (values 100, 101, 200, 201, ...) into text embedded as its own ids."""
    ids = torch.tensor(rows)
    embed = nn.Embedding.from_pretrained(torch.arange(9.0).unsqueeze(1))  # the placeholder lies outside on purpose
    images = [torch.tensor([[100.0 * (n + 1)], [100.0 * (n + 1) + 1]]) for n in range(num_images)]
    mask = None if masks is None else torch.tensor(masks)
    plan = plan_splice(ids, mask, IMAGE, lengths or [EXPANDED] * num_images, padding_side)
    label_tensor = None if labels is None else torch.tensor(labels)
    return splice(plan, ids, embed, images, label_tensor)


def values(prepared):
    return prepared.inputs_embeds.squeeze(-1).int().tolist()


def test_one_placeholder_and_expanded_run_give_the_same():
    short = run([[1, 2, IMAGE, 3]], 1)
    assert values(short) == [[1, 2, 100, 101, 3]]
    long = run([[1, 2, *[IMAGE] * 4, 3]], 1)
    assert values(long) == values(short)
    assert short.attention_mask.tolist() == [[1] * 5] and short.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert short.num_visual_tokens == [2] and short.labels is None


def test_several_images_adjacent_or_apart_and_mixed_forms():
    assert values(run([[IMAGE, IMAGE, 1]], 2)) == [[100, 101, 200, 201, 1]]
    assert values(run([[*[IMAGE] * 8, 1]], 2)) == [[100, 101, 200, 201, 1]]
    assert values(run([[IMAGE, 1, *[IMAGE] * 4, 2, IMAGE]], 3)) == [[100, 101, 1, 200, 201, 2, 300, 301]]
    assert values(run([[*[IMAGE] * 8, 1]], 2, lengths=[3, 5])) == [[100, 101, 200, 201, 1]]


def test_images_go_to_their_prompts_and_padding_keeps_its_side():
    rows, masks = [[0, 0, 5, 6], [1, IMAGE, IMAGE, 2]], [[0, 0, 1, 1], [1, 1, 1, 1]]
    left = run(rows, 2, masks)
    assert values(left) == [[0, 0, 0, 0, 5, 6], [1, 100, 101, 200, 201, 2]]
    assert left.attention_mask.tolist() == [[0, 0, 0, 0, 1, 1], [1] * 6]
    assert left.position_ids.tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    right = run([[5, 6, 0, 0], rows[1]], 2, [[1, 1, 0, 0], [1] * 4])
    assert values(right) == [[5, 6, 0, 0, 0, 0], [1, 100, 101, 200, 201, 2]]
    assert right.position_ids.tolist()[0] == [0, 1, 0, 0, 0, 0]
    assert values(run([[5, 6, 0, 0], rows[1]], 2, [[1, 1, 0, 0], [1] * 4], padding_side="left")) == values(left)


def test_padding_made_by_images_alone_goes_left():
    assert values(run([[5, 6], [1, IMAGE]], 1)) == [[0, 5, 6], [1, 100, 101]]


def test_placeholders_under_the_mask_are_padding():
    assert values(run([[IMAGE, IMAGE, 5, IMAGE]], 1, [[0, 0, 1, 1]])) == [[5, 100, 101]]


def test_labels_are_ignored_on_images_and_padding():
    prepared = run(
        [[1, IMAGE, 2, 3], [4, 5, 0, 0]],
        1,
        [[1] * 4, [1, 1, 0, 0]],
        labels=[[-100, -100, 2, 3], [-100, 5, 7, 7]],
    )
    assert prepared.labels.tolist() == [[-100, -100, -100, 2, 3], [-100, 5, -100, -100, -100]]


def test_gradients_reach_images_and_text():
    embed = nn.Embedding(9, 3)
    image = torch.randn(2, 3, requires_grad=True)
    ids = torch.tensor([[1, IMAGE, 2]])
    splice(plan_splice(ids, None, IMAGE, [EXPANDED]), ids, embed, [image]).inputs_embeds.sum().backward()
    assert torch.equal(image.grad, torch.ones(2, 3))
    assert embed.weight.grad.sum() == 6 and embed.weight.grad[0].sum() == 0  # the placeholder's stand-in is not used


@pytest.mark.parametrize(
    ("rows", "num_images", "message"),
    [
        ([[1, 2]], 1, r"0 <image> placeholders .*but 1 images"),
        ([[1, IMAGE]], 0, r"1 <image> placeholders .*but 0 images"),
        ([[IMAGE, 1, IMAGE]], 1, r"2 <image> placeholders .*but 1 images"),
        ([[IMAGE, IMAGE, IMAGE, 1]], 1, r"3 <image> placeholders .*but 1 images.* run of 4"),
        # The totals agree with two expanded images; the split between the prompts does not.
        ([[*[IMAGE] * 3, 1, 1], [*[IMAGE] * 5]], 2, r"prompt 0: 3, prompt 1: 5"),
        ([[*[IMAGE] * 5, 1]], 1, r"5 <image> placeholders .*but 1 images"),
    ],
)
def test_other_counts_are_refused_with_both_numbers(rows, num_images, message):
    with pytest.raises(PromptError, match=message):
        run(rows, num_images)


def test_shapes_are_checked():
    with pytest.raises(PromptError, match="input_ids"):
        plan_splice(torch.tensor([1, 2]), None, IMAGE, [])
    with pytest.raises(PromptError, match="integers"):
        plan_splice(torch.tensor([[1.0]]), None, IMAGE, [])
    with pytest.raises(PromptError, match="attention_mask"):
        plan_splice(torch.tensor([[1, 2]]), torch.ones(1, 3), IMAGE, [])
    with pytest.raises(PromptError, match="labels"):
        run([[1, 2]], 0, labels=[[1]])


def test_a_prompt_that_is_all_padding_stays_padding():
    assert run([[0, 0], [1, 2]], 0, [[0, 0], [1, 1]]).attention_mask.tolist() == [[0, 0], [1, 1]]
