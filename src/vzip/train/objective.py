"""What is minimised: the cross-entropy of the assistant's words, given compressed images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vzip.compressors.base import Compressor
from vzip.data.collate import Batch
from vzip.media.video import DEFAULT_NUM_FRAMES
from vzip.models.families import VisualInputs
from vzip.models.families.finite import check_embeddings
from vzip.models.families.places import VisualTokens
from vzip.models.freeze import zero_of
from vzip.models.sharing import SharedInputs, check_shares, share_rows
from vzip.models.splice import IGNORED_LABEL, PreparedInputs, plan_splice, positions_before, splice_tokens
from vzip.models.vlm import CompressedVlm
from vzip.results.token_count import TokenCountError

from .features import visual_tokens


class ModelView:
    """What the collator needs of a wrapped model (``vzip.data.collate.ImageEncoder``).

    Args:
        vlm: the model.
        compressor: by which tokens are counted; None: the model's own.
    """

    def __init__(self, vlm: CompressedVlm, compressor: Compressor | None = None) -> None:
        self.vlm, self.compressor = vlm, compressor

    def preprocess_images(self, images: Sequence[Image.Image], num_images: Sequence[int]) -> dict[str, Tensor]:
        return self.vlm.preprocess_images(images, num_images)

    def expected_num_tokens(self, inputs: dict[str, Tensor]) -> list[int]:
        shapes = self.vlm.adapter.read_inputs(**self.vlm.adapter.counted(inputs, None, None)).shapes
        compressor = self.compressor or self.vlm.compressor
        return [compressor.num_visual_tokens(shape) for shape in shapes]

    @property
    def num_frames(self) -> int:
        return self.vlm.num_frames or DEFAULT_NUM_FRAMES

    def preprocess_videos(self, videos: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        return self.vlm.preprocess_videos(videos)


class AnswerLoss(nn.Module):
    """The summed cross-entropy of each sample's target tokens.

    A sum, not a mean: the caller divides by the tokens of the whole step, so that every token weighs the same however
    the step is split.

    Args:
        vlm: the wrapped model.
        always_whole: run every part of the model on every batch, on a blank image (and video) that counts nothing
            where the batch has none. Several processes need that where more than the projector trains (ZeRO sums
            gradients in the order in which they come, which must be the same everywhere) or where they share the
            weights out.
    """

    def __init__(self, vlm: CompressedVlm, always_whole: bool = False) -> None:
        super().__init__()
        self.vlm = vlm
        self.blank: dict[str, dict[str, Tensor]] = {}
        if always_whole:
            image = Image.new("RGB", (32, 32))
            self.blank["image"] = vlm.preprocess_images([image])
            if vlm.adapter.learns_videos:
                self.blank["video"] = vlm.preprocess_videos([[image]])
        # Kept from now: ZeRO-3 takes the parameters apart, and then they have no shape to be read.
        self.least_projected = vlm.adapter.least_projected

    def forward(self, batch: Batch) -> Tensor:
        """Returns ``[samples]``, in nats; float32, or float64 for a float64 model."""
        if not batch.sample_of:
            return self._without_samples(len(batch.ids))
        images, videos, blank = self._encode(batch)
        prepared = self._splice(batch, images, videos)
        given: PreparedInputs | SharedInputs = prepared
        if batch.rows is not None:
            given = shared = share_rows(prepared, batch.rows, check_shares(self.vlm.model.config.get_text_config()))
        embeds = given.inputs_embeds + _nothing(blank) if blank else given.inputs_embeds
        assert given.labels is not None
        targets = given.labels[:, 1:]
        # The language model's head is run only where some sequence has a target: most positions have none.
        positions = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
        with self.vlm.adapter.language_context(given.visual_index, given.planes):
            logits = self.vlm.model(
                inputs_embeds=embeds,
                attention_mask=given.attention_mask,
                position_ids=given.position_ids,
                use_cache=False,
                logits_to_keep=positions,
            ).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = functional.cross_entropy(
            logits.transpose(1, 2), targets[:, positions], ignore_index=IGNORED_LABEL, reduction="none"
        )
        owner = torch.tensor(batch.sample_of, device=nats.device)
        if batch.rows is None:
            nats = nats.sum(dim=1)
        else:
            owner = owner[shared.prompt_of.to(owner.device)[:, 1:][:, positions].clamp(min=0)].flatten()
            nats = nats.flatten()
        summed = torch.zeros(len(batch.ids), dtype=nats.dtype, device=nats.device).index_add(0, owner, nats)
        whole = batch.image_of or batch.video_of or self.blank
        return summed if whole else summed + self._without_samples(len(batch.ids))

    def prepare(self, batch: Batch) -> PreparedInputs:
        """The language model's inputs; each image is encoded once, however many sequences ask about it.

        Raises:
            TokenCountError: the compressor made another number of visual tokens than its budget.
        """
        images, videos, _ = self._encode(batch)
        return self._splice(batch, images, videos)

    def _encode(self, batch: Batch) -> tuple[list[VisualTokens], list[VisualTokens], list[VisualTokens]]:
        """The visual tokens of images, of videos, and of what is blank instead.

        Images first, then videos, before the text embedding: ZeRO-3 gathers weights in the order of their use.
        """
        compressor = batch.compressor or self.vlm.compressor
        images: list[VisualTokens] = []
        videos: list[VisualTokens] = []
        blank: list[VisualTokens] = []
        if batch.image_of and batch.kept:
            images = visual_tokens(self.vlm.adapter, batch.kept, compressor, batch.input_ids.device)
            check_embeddings(self.vlm.model, [each.rows for each in images], {})
            self._check_counts("image", images, batch.num_visual_tokens, compressor)
        elif batch.image_of:
            images = self._tokens(batch.images, compressor)
            self._check_counts("image", images, batch.num_visual_tokens, compressor)
        elif "image" in self.blank:
            blank += self._tokens(self.blank["image"], compressor)
        if batch.video_of:
            videos = self._tokens(batch.videos, compressor)
            self._check_counts("video", videos, batch.num_video_tokens, compressor)
        elif "video" in self.blank:
            blank += self._tokens(self.blank["video"], compressor)
        return images, videos, blank

    def _tokens(self, inputs: Mapping[str, Tensor], compressor: Compressor) -> list[VisualTokens]:
        tokens = self.vlm.adapter.encode(self.vlm.adapter.read_inputs(**inputs), compressor)
        check_embeddings(self.vlm.model, [each.rows for each in tokens], inputs)
        return tokens

    def _check_counts(self, thing: str, made: list[VisualTokens], wanted: list[int], compressor: Compressor) -> None:
        if [len(each.rows) for each in made] != wanted:
            raise TokenCountError(
                f"{compressor} should make {wanted} visual tokens of these {thing}s, but made"
                f" {[len(each.rows) for each in made]}: the training would not be at its budget."
            )

    def _splice(self, batch: Batch, images: list[VisualTokens], videos: list[VisualTokens]) -> PreparedInputs:
        adapter = self.vlm.adapter
        seen = [adapter.read_inputs(**inputs) for inputs in (batch.images, batch.videos)]
        shapes = [image.shape for image in batch.kept] or seen[0].images
        shown = VisualInputs(
            [shapes[number] for number in batch.image_of],
            [seen[1].videos[number] for number in batch.video_of],
            {},
        )
        tokens = [*(images[number] for number in batch.image_of), *(videos[number] for number in batch.video_of)]
        ids = batch.input_ids
        plan = plan_splice(
            ids,
            batch.attention_mask,
            adapter.image_token_id,
            [1] * len(shown.images),  # placeholders
            "right",
            adapter.video_token_id,
            [1] * len(shown.videos),
            getattr(adapter.embed_tokens, "num_embeddings", None),
        )
        before = positions_before(adapter, plan, ids, shown.shapes)
        return splice_tokens(adapter, plan, ids, shown, tokens, before, batch.labels)

    def _without_samples(self, num_samples: int) -> Tensor:
        """Zeros that depend on the projector: a step without images must still give it (zero) gradients.

        Otherwise backward has nothing to do in a text-only batch, and several processes wait for each other forever.
        """
        if self.blank:
            none = torch.zeros(0, 0, dtype=torch.int64)
            blank = self._encode(Batch([], [], none, none, none))[2]
            rows = torch.cat([each.rows for each in blank])[None]
            axes = self.vlm.adapter.position_axes
            positions = torch.arange(rows.shape[1], device=rows.device).expand(axes, 1, -1)
            logits = self.vlm.model(
                inputs_embeds=rows, position_ids=positions if axes > 1 else positions[0], use_cache=False
            ).logits
            return torch.zeros(num_samples, device=logits.device) + 0.0 * logits.float().mean() + _nothing(blank)
        zero = zero_of(self.vlm.adapter.projector, self.least_projected)
        return torch.zeros(num_samples, device=zero.device) + zero


def _nothing(tokens: Sequence[VisualTokens]) -> Tensor:
    """Zero, which depends on all that was made of images and videos."""
    parts = [part for each in tokens for part in (each.rows, each.planes) if part is not None]
    return 0.0 * torch.stack([part.mean() for part in parts]).sum()
