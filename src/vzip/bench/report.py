"""A measurement for reading: terminal table, JSON file, plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vzip.bench.device_memory import GIB
from vzip.bench.run import BenchResult, MethodResult
from vzip.bench.stages import STAGES
from vzip.bench.timing import Timing
from vzip.installed import missing_package
from vzip.results.files import make_folder, written_aside

if TYPE_CHECKING:
    from vzip.bench.training import SideResult

MIB = 1024**2
PLOTTED = ("preprocess", "encode", "tower", "high_res_tower", "mining", "selection", "projector", "splice", "prefill")
ROW_WORDS = {
    "scoring": "  scoring in it",
    "decode_per_token": "decode a token",
    "time_to_first_token": "to first token",
}
FLOPS_WORDS = {
    "tower": "tower GFLOPs",
    "high_res_tower": "high-res GFLOPs",
    "mining": "mining GFLOPs",
    "prefill": "prefill GFLOPs",
    "decode_per_token": "decode GFLOPs",
}
LIMIT_WORDS = {"tower": "tower of limit", "prefill": "prefill of limit"}
RATIO_WORDS = {
    "selection_share_of_tower": "scoring + selection + merge: {:.2%} of the tower",
    "tower_and_selection_speedup_over_eager_maps": "tower + selection: {:.2f}x as fast as eager_maps",
    "tower_and_selection_speedup_over_vanilla": "tower + selection: {:.2f}x as fast as vanilla's tower",
    "prefill_speedup_over_vanilla": "prefill: {:.2f}x as fast as vanilla",
    "decode_per_token_speedup_over_vanilla": "decode per token: {:.2f}x as fast as vanilla",
    "time_to_first_token_speedup_over_vanilla": "time to first token: {:.2f}x as fast as vanilla",
    "time_to_first_token_speedup_over_eager_maps": "time to first token: {:.2f}x as fast as eager_maps",
    "prefill_speedup_of_compiled": "compiled prefill: {:.2f}x as fast",
    "decode_per_token_speedup_of_compiled": "compiled decode per token: {:.2f}x as fast",
    "time_to_first_token_speedup_of_compiled": "compiled time to first token: {:.2f}x as fast",
    "tower_share_of_limit": "tower + selection: {:.0%} of the machine's limit",
    "prefill_share_of_limit": "prefill: {:.0%} of the machine's limit",
    "memory_added_reduction_over_eager_maps": "memory added by a pass: {:.1f}x less than eager_maps",
    "kv_cache_reduction_over_vanilla": "key-value cache: {:.2f}x smaller than vanilla's",
}


def _budget_words(resolved: Mapping[str, Any]) -> str:
    of_what = "video" if resolved["scope"] == "video" else "crop"
    if "dominant" in resolved:
        return f"{resolved['dominant']:g}+{resolved['contextual']:g} of a {of_what}'s patches"
    return f"{resolved['num_dominant']}+{resolved['num_contextual']} a {of_what}"


def print_result(result: BenchResult | SideResult, console: Console) -> None:
    """Prints the table, the ratios and what was checked."""
    if not isinstance(result, BenchResult):
        _print_side(result, console)
        return
    r, e = result.resolved, result.environment
    facts = (
        f"{r['num_parameters'] / 1e6:.1f} M parameters, {r['weights']} weights",
        f"{r['dtype']} on {r['device']} ({e['processor']}, {e['num_threads']} threads)",
        f"batch of {result.settings['batch_size']}: {r['prompt']} a prompt",
        f"budget {_budget_words(r)}",
        f"{result.settings['repeats']} interleaved repeats",
        f"torch {e['torch']}, transformers {e['transformers']}",
    )
    console.print(f"[bold]{result.model}[/bold]: " + "; ".join(facts), highlight=False)
    console.print(build_table(result))
    if _num_passes(result) == 1:
        console.print("  each time is of one pass, so their spread is not known", highlight=False)
    for key, words in RATIO_WORDS.items():
        if key in result.ratios():
            single = "" if _num_passes(result) > 1 else " (one pass each: that may be chance; repeats=5 would tell)"
            console.print(
                "  " + ("" if key.endswith("compiled") else "vzip ") + words.format(result.ratios()[key]) + single,
                highlight=False,
                soft_wrap=True,
            )
    if result.agreement is not None:
        tokens, overlap = result.agreement.max_token_difference, result.selection_overlap
        console.print(
            f"  checked: vzip and eager_maps give the same visual tokens to {tokens:.1e} (float32); "
            f"in {r['dtype']} {overlap:.0%} of the dominant tokens are the same",
            highlight=False,
        )
    console.print("  " + _flops_words(result), highlight=False)
    if result.products:
        console.print(
            "  the machine's limit: all of a stage's operations (the tower's time with selection) at the rate of its"
            f" matrix products alone ({len(result.products)} shapes, timed in turn with the passes)",
            highlight=False,
            soft_wrap=True,
        )
    for name, method in result.methods.items():
        kernels = ", ".join(method.attention_kernels) or "none fused"
        console.print(f"  attention of {name}: {kernels}", highlight=False)
    kind = next(iter(result.methods.values())).memory_kind
    console.print(f"  peak memory is {_MEMORY_WORDS[kind]}", highlight=False)
    for note in result.notes:
        console.print(f"  note: {note}", highlight=False)


def _print_side(result: SideResult, console: Console) -> None:
    """The same for a measurement of training or of memory."""
    r, e = result.resolved, result.environment
    facts = (
        f"{r['num_parameters'] / 1e6:.1f} M parameters, {r['weights']} weights",
        f"{r['dtype']} on {r['device']} ({e['processor']}, {e['num_threads']} threads)",
        f"{r['samples_per_step']} conversations at once, {r['text_tokens']} text tokens and one image each",
        "training the projector with gradient checkpointing",
        f"torch {e['torch']}, transformers {e['transformers']}",
    )
    console.print(f"[bold]{result.model}[/bold]: " + "; ".join(facts), highlight=False)
    console.print(_training_table(result) if result.kind == "train" else _memory_table(result))
    for note in result.notes:
        console.print(f"  note: {note}", highlight=False)


def _training_table(result: SideResult) -> Table:
    table = Table("", *result.methods)
    methods = list(result.methods.values())
    table.add_row("visual tokens", *(str(m.num_visual_tokens) for m in methods))
    table.add_row("tokens in all", *(str(m.num_tokens) for m in methods))
    table.add_row("step, ms", *(_time(m.stages["step"]) for m in methods))
    table.add_row("  forward in it", *(_time(m.stages["forward"]) for m in methods))
    table.add_row("samples a second", *(f"{m.samples_per_s:.2f}" for m in methods))
    table.add_row("projected hours", *(f"{m.projected_hours:.2f}" for m in methods))
    table.add_row("peak memory, GiB", *(f"{m.measured_bytes / GIB:.2f}" for m in methods))
    estimated = (sum(m.estimated_bytes.values()) for m in methods)
    table.add_row("  tensors, estimated", *(f"{num_bytes / GIB:.2f}" for num_bytes in estimated))
    table.add_row("loss", *(f"{m.loss:.3f}" for m in methods))
    table.caption = f"peak memory is {_MEMORY_WORDS[methods[0].memory_kind]}"
    return table


def _memory_table(result: SideResult) -> Table:
    table = Table("", "visual tokens", "tokens in all", "measured, GiB", "estimated, GiB", "off by")
    for name, works in result.methods.items():
        for work, peak in works.items():
            estimated = sum(peak.estimated_bytes.values())
            table.add_row(
                f"{name}, {work}",
                str(peak.num_visual_tokens),
                str(peak.num_tokens),
                f"{peak.measured_bytes / GIB:.3f}",
                f"{estimated / GIB:.3f}",
                f"{estimated / peak.measured_bytes - 1:+.1%}",
            )
    return table


def _flops_words(result: BenchResult) -> str:
    """One line on the operation counts: the convention, and whether the two ways of counting agree."""
    both = [
        (f"{name} {stage}", f.counted, f.formula)
        for name, method in result.methods.items()
        for stage, f in method.flops.items()
        if f.formula is not None
    ]
    apart = [
        f"{what}: {counted} counted, {formula} by formula" for what, counted, formula in both if counted != formula
    ]
    agree = (
        f"counted operations differ from the formula in {'; '.join(apart)}"
        if apart
        else (f"counted operations equal the closed formula in all {len(both)} cases that have one")
    )
    return f"FLOPs: 1 multiply-add = 2; {agree}"


_MEMORY_WORDS = {
    "cuda_max_allocated": "what torch allocated on the GPU at most, weights included",
    "rss_peak": "the process's largest resident memory during a pass, weights and program included",
    "rss_peak_of_process": "the process's largest resident memory since it began (this system cannot reset it)",
}


def _num_passes(result: BenchResult) -> int:
    """How often each stage was timed."""
    return min(len(timing.samples_ms) for method in result.methods.values() for timing in method.stages.values())


def build_table(result: BenchResult) -> Table:
    """One column a method, one row a quantity; times are medians with the quartiles."""
    shown = "one pass each" if _num_passes(result) == 1 else "median \\[quartiles]"
    table = Table(title=f"times in milliseconds: {shown}", title_justify="left")
    table.add_column("")
    for name in result.methods:
        table.add_column(name, justify="right")
    methods = list(result.methods.values())
    for stage in STAGES:
        if any(stage in m.stages for m in methods):
            table.add_row(
                ROW_WORDS.get(stage, stage), *(_time(m.stages[stage]) if stage in m.stages else "-" for m in methods)
            )
    table.add_section()
    table.add_row("visual tokens", *(str(m.num_visual_tokens) for m in methods))
    if not result.resolved["tower_only"]:
        table.add_row("prompt tokens", *(str(m.num_prompt_tokens) for m in methods))
        table.add_row("KV cache, MiB", *(f"{m.kv_cache_bytes / MIB:.2f}" for m in methods))
    table.add_row("peak memory, GiB", *(f"{m.peak_memory_bytes / GIB:.2f}" for m in methods))
    table.add_row("  added by pass", *(f"{m.peak_memory_added_bytes / GIB:.2f}" for m in methods))
    for stage in FLOPS_WORDS:
        if stage in methods[0].flops:
            table.add_row(FLOPS_WORDS[stage], *(f"{m.flops[stage].counted / 1e9:,.3f}" for m in methods))
    for stage, words in LIMIT_WORDS.items():
        if any(stage in m.limit_ms for m in methods):
            table.add_row(words, *(_of_limit(m, stage) for m in methods))
    return table


def _of_limit(method: MethodResult, stage: str) -> str:
    share = method.share_of_limit(stage)
    return "-" if share is None else f"{share:.0%} of {method.limit_gflops[stage]:,.0f} GFLOP/s"


def _time(t: Timing) -> str:
    digits = 0 if t.median_ms >= 100 else 1 if t.median_ms >= 10 else 2
    if len(t.samples_ms) == 1:
        return f"{t.median_ms:.{digits}f}"
    return f"{t.median_ms:.{digits}f} [{t.q1_ms:.{digits}f}-{t.q3_ms:.{digits}f}]"


def write_plot(result: BenchResult, path: Path) -> None:
    """Draws the way to the first token as one stacked bar a method.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("the plot", "matplotlib", error) from error
    figure = Figure(figsize=(8, 0.8 * len(result.methods) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = list(result.methods)[::-1]
    left = dict.fromkeys(names, 0.0)
    for stage in PLOTTED:
        widths = [result.methods[name].median_ms(stage) for name in names]
        if not any(widths):
            continue
        axes.barh(names, widths, left=[left[name] for name in names], label=stage)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axes.set_xlabel("milliseconds (sum of stage medians)")
    axes.set_title(
        f"{result.model}, {result.resolved['dtype']}, {result.resolved['device']}: "
        + ", ".join(f"{name} {result.methods[name].num_visual_tokens} visual tokens" for name in result.methods),
        fontsize="small",
    )
    axes.legend(fontsize="small", ncols=len(PLOTTED), loc="upper center", bbox_to_anchor=(0.5, -0.25))
    make_folder(path.parent)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150)
