"""What is minimised: the cross-entropy of the assistant's words, given compressed pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vzip.data.collate import Batch
from vzip.data.conversations import IGNORED_LABEL
from vzip.evaluation.token_count import TokenCountError, expected_token_counts
from vzip.models.compressed_vlm import CompressedVlm
from vzip.models.splice import PreparedInputs, plan_splice, splice


class ModelView:
    """What the collator needs of a wrapped model (``vzip.data.collate.PictureEncoder``)."""

    def __init__(self, vlm: CompressedVlm) -> None:
        self.vlm = vlm

    def preprocess_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return self.vlm.preprocess_images(images)

    def expected_num_tokens(self, inputs: dict[str, Tensor]) -> list[int]:
        return expected_token_counts(self.vlm, **inputs)


class AnswerLoss(nn.Module):
    """The summed cross-entropy of each sample's target tokens.

    A sum, not a mean: the caller divides by the tokens of the whole step, so that every token weighs the same however
    the step is split.

    Args:
        vlm: the wrapped model.
        always_whole: run every part of the model on every batch, on a blank picture that counts nothing where the
            batch has none. Several processes need that where more than the projector trains (ZeRO sums gradients in
            the order in which they come, which must be the same everywhere) or where they share the weights out.
    """

    def __init__(self, vlm: CompressedVlm, always_whole: bool = False) -> None:
        super().__init__()
        self.vlm = vlm
        self.blank: dict[str, Tensor] | None = None
        if always_whole:
            self.blank = vlm.preprocess_images([Image.new("RGB", (32, 32))])
        # Kept from now: ZeRO-3 takes the parameters apart, and then they have no shape to be read.
        self.tower_width = next(p for p in vlm.adapter.projector.parameters() if p.ndim == 2).shape[1]

    def forward(self, batch: Batch) -> Tensor:
        """Returns ``[samples]``, in nats; float32, or float64 for a float64 model."""
        if not batch.sample_of:
            return self._without_samples(len(batch.ids))
        # Before the text embedding, as with pictures: ZeRO-3 gathers weights in the order in which they are used.
        blank = self._blank_tokens() if self.blank is not None and not batch.picture_of else None
        prepared = self.prepare(batch)
        embeds = prepared.inputs_embeds if blank is None else prepared.inputs_embeds + 0.0 * blank.mean()
        assert prepared.labels is not None
        targets = prepared.labels[:, 1:]
        # The language model's head is run only where some sequence has a target: most positions have none.
        positions = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
        logits = self.vlm.model(
            inputs_embeds=embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            use_cache=False,
            logits_to_keep=positions,
        ).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = functional.cross_entropy(
            logits.transpose(1, 2), targets[:, positions], ignore_index=IGNORED_LABEL, reduction="none"
        )
        owner = torch.tensor(batch.sample_of, device=nats.device)
        summed = torch.zeros(len(batch.ids), dtype=nats.dtype, device=nats.device).index_add(0, owner, nats.sum(dim=1))
        whole = batch.picture_of or self.blank is not None
        return summed if whole else summed + self._without_samples(len(batch.ids))

    def prepare(self, batch: Batch) -> PreparedInputs:
        """The language model's inputs; each picture is encoded once, however many sequences ask about it.

        Raises:
            TokenCountError: the compressor made another number of visual tokens than its budget.
        """
        vlm = self.vlm
        images = vlm.encode_images(**batch.pictures) if batch.picture_of else []
        if batch.picture_of and [len(image) for image in images] != batch.num_visual_tokens:
            raise TokenCountError(
                f"{vlm.compressor} should make {batch.num_visual_tokens} visual tokens of these pictures, but made"
                f" {[len(image) for image in images]}: the training would not be at its budget."
            )
        per_placeholder = [images[picture] for picture in batch.picture_of]
        token_id = vlm.adapter.image_token_id
        plan = plan_splice(batch.input_ids, batch.attention_mask, token_id, [1] * len(per_placeholder), "right")
        return splice(plan, batch.input_ids, vlm.adapter.embed_tokens, per_placeholder, token_id, batch.labels)

    def _without_samples(self, num_samples: int) -> Tensor:
        """Zeros that depend on the projector: a step without pictures must still give it (zero) gradients.

        Otherwise backward has nothing to do in a text-only batch, and several processes wait for each other forever.
        """
        if self.blank is not None:
            logits = self.vlm.model(inputs_embeds=self._blank_tokens()[None], use_cache=False).logits
            return torch.zeros(num_samples, device=logits.device) + 0.0 * logits.float().mean()
        projector = self.vlm.adapter.projector
        first = next(projector.parameters())
        tokens = torch.zeros(1, 1, self.tower_width, dtype=first.dtype, device=first.device)
        return torch.zeros(num_samples, device=first.device) + 0.0 * projector(tokens).sum().float()

    def _blank_tokens(self) -> Tensor:
        """The visual tokens of the blank picture."""
        assert self.blank is not None
        return self.vlm.encode_images(**self.blank)[0]
