"""What the task files of ``tasks/video`` name: lmms-eval's own functions for Video-MME and LongVideoBench."""

from __future__ import annotations

from .unused_packages import unused

with unused("cv2", "decord"):
    from lmms_eval.tasks.longvideobench.utils import (
        longvideobench_aggregate_results as longvideobench_score,
    )
    from lmms_eval.tasks.longvideobench.utils import (
        longvideobench_doc_to_text as longvideobench_text,
    )
    from lmms_eval.tasks.longvideobench.utils import (
        longvideobench_doc_to_visual_v as longvideobench_visual,
    )
    from lmms_eval.tasks.longvideobench.utils import (
        longvideobench_process_results as longvideobench_results,
    )
    from lmms_eval.tasks.videomme.utils import (
        videomme_aggregate_results as videomme_score,
    )
    from lmms_eval.tasks.videomme.utils import (
        videomme_doc_to_text as videomme_text,
    )
    from lmms_eval.tasks.videomme.utils import (
        videomme_doc_to_visual as videomme_visual,
    )
    from lmms_eval.tasks.videomme.utils import (
        videomme_process_results as videomme_results,
    )

__all__ = [
    "longvideobench_results",
    "longvideobench_score",
    "longvideobench_text",
    "longvideobench_visual",
    "videomme_results",
    "videomme_score",
    "videomme_text",
    "videomme_visual",
]
