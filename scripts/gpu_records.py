"""Gathers what scripts/gpu_check.sh made into flat records, and prints one table; exit code 1 if a part failed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vzip.bench.run import environment

GIB, MIB = 2**30, 2**20
TAIL_LINES = 15
TIMED_OUT = (124, 137)
# Part -> the file that it shares with others: of all there are eight at most.
TOGETHER = {
    "llava15_7b_batch": "llava15_7b_batch",
    "llava15_7b_batch64": "llava15_7b_batch",
    "llava_next_7b": "llava_next",
    "llava_next_13b": "llava_next",
    "qwen2_5_vl_7b": "qwen_vl",
    "qwen3_vl_8b": "qwen_vl",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="what the parts have left: parts, NAME.log, NAME/*.json, tests.xml")
    parser.add_argument("out", type=Path, help="where the records go")
    parser.add_argument("--small", action="store_true", help="the run was in small, on the CPU")
    arguments = parser.parse_args()
    parts, records = gather(arguments.work)
    device = torch.device("cpu" if arguments.small or not torch.cuda.is_available() else "cuda")
    about = environment(device)
    about["command"] = f"scripts/gpu_check.sh {'--small ' if arguments.small else ''}OUTDIR"
    records["summary"] = {"kind": "summary", "small": arguments.small, "environment": about, "parts": parts}
    for name, record in records.items():
        if name == "tests":
            record["environment"] = {**about, "command": record.pop("command")}
        told = record["environment"]["code"]
        if told["commit"] is None and os.environ.get("COMMIT"):  # a copy without its history
            told |= {"commit": os.environ["COMMIT"], "told_by": "COMMIT"}
    files = as_files(records)
    for name, content in files.items():
        (arguments.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    console = Console(width=120)
    console.print(table(records, parts))
    failed = {name: part for name, part in parts.items() if part["failure"]}
    for name, part in failed.items():
        console.print(f"FAILED {name}: {part['failure']}", highlight=False, markup=False)
    console.print(f"{len(files)} files in {arguments.out}; {sum(p['seconds'] for p in parts.values())} s in all")
    return 1 if failed else 0


def gather(work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """How each part ended, and the records of those that made one."""
    parts: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for line in (work / "parts").read_text().splitlines():
        name, code, seconds = line.split()
        made = list((work / name).glob("*.json"))
        if made:
            records[name] = json.loads(made[0].read_text())
        failure = None
        if int(code) in TIMED_OUT:
            failure = "ran past its time"
        elif int(code):
            failure = " | ".join((work / f"{name}.log").read_text().strip().splitlines()[-TAIL_LINES:])
        if name == "tests":
            failure, record = tests_record(work / "tests.xml", failure)
            records |= {"tests": record} if record else {}
        parts[name] = {"exit_code": int(code), "seconds": int(seconds), "failure": failure}
    return parts, records


def as_files(records: Mapping[str, Any]) -> dict[str, Any]:
    """What each file holds: a record, or several by their parts' names where they share one."""
    files: dict[str, Any] = {}
    for name, record in records.items():
        if name in TOGETHER:
            files.setdefault(TOGETHER[name], {})[name] = record
        else:
            files[name] = record
    return files


def tests_record(path: Path, failure: str | None) -> tuple[str | None, dict[str, Any] | None]:
    """What pytest says; a test that was skipped has shown nothing and counts as failed."""
    if not path.exists():
        if failure and "No module named pytest" in failure:
            failure = "pytest is not installed: install it, or carry the wheels of pytest, pluggy and iniconfig"
        return failure, None
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    bad = {
        f"{case.get('classname')}::{case.get('name')}": f"{child.tag}: {(child.get('message') or '')[:500]}"
        for case in cases
        for child in case
        if child.tag in ("failure", "error", "skipped")
    }
    record = {
        "kind": "tests",
        "command": "python -m pytest -m gpu",
        "num_tests": len(cases),
        "num_passed": len(cases) - len(bad),
        "not_passed": bad,
        "seconds": {f"{case.get('classname')}::{case.get('name')}": float(case.get("time", 0)) for case in cases},
    }
    if bad:
        failure = f"{len(bad)} of {len(cases)} tests: {'; '.join(list(bad)[:5])}"
    elif not cases:
        failure = failure or "no test was found"
    return failure, record


def table(records: Mapping[str, Any], parts: Mapping[str, Any]) -> Table:
    """One row a finding."""
    shown = Table("part", "what", "tokens", "value", title="gpu_check", title_justify="left")
    for name, part in parts.items():
        rows = (
            list(_ROWS.get(records[name].get("kind", "bench"), _bench_rows)(records[name])) if name in records else []
        )
        how = "failed" if part["failure"] else "ok"
        shown.add_row(name, how, "", f"{part['seconds']} s", style=None if how == "ok" else "bold red")
        for what, tokens, value in rows:
            shown.add_row("", what, tokens, value)
        if name == "llava_next_13b" and name in records and "llava_next_7b" in records:
            for what, tokens, value in _against(records["llava_next_7b"], records[name]):
                shown.add_row("", what, tokens, value)
        shown.add_section()
    return shown


Rows = Iterator[tuple[str, str, str]]


def _ms(method: Mapping[str, Any], *stages: str) -> float:
    return sum(method["stages"][stage]["median_ms"] for stage in stages if stage in method["stages"])


def _bench_rows(record: Mapping[str, Any]) -> Rows:
    for name, method in record["methods"].items():
        yield (
            f"{name}, ms: tower + selection, prefill, a token, to the first",
            str(method["num_visual_tokens"]),
            f"{_ms(method, 'tower', 'selection'):.2f}, {_ms(method, 'prefill'):.2f}, "
            f"{_ms(method, 'decode_per_token'):.2f}, {_ms(method, 'time_to_first_token'):.2f}",
        )
        yield (
            f"{name}: cache MiB, peak GiB; attention",
            "",
            f"{method['kv_cache_bytes'] / MIB:.1f}, {method['peak_memory_bytes'] / GIB:.2f}; "
            + ", ".join(kernel.removeprefix("_scaled_dot_product_") for kernel in method["attention_kernels"]),
        )
        if "selection" in method["stages"]:
            yield f"{name}: selection + merge, ms", "", f"{_ms(method, 'selection'):.2f}"
    ratios = record["ratios"]
    for other in ("vanilla", "eager_maps"):
        for key in ("tower_and_selection", "prefill", "decode_per_token", "time_to_first_token"):
            if (ratio := ratios.get(f"{key}_speedup_over_{other}")) is not None:
                yield f"{key}: vzip over {other}", "", f"{ratio:.2f}x"
    for stage in ("tower", "prefill"):
        if (share := ratios.get(f"{stage}_share_of_limit")) is not None:
            yield f"{stage}: vzip, of the rate of its matrix products alone", "", f"{share:.0%}"


def _against(small: Mapping[str, Any], large: Mapping[str, Any]) -> Rows:
    """The larger model with few tokens over the smaller one with all."""
    vanilla, ours = small["methods"]["vanilla"], large["methods"]["vzip"]
    for stage in ("prefill", "decode_per_token", "time_to_first_token"):
        tokens = f"{ours['num_visual_tokens']} / {vanilla['num_visual_tokens']}"
        ratio = _ms(vanilla, stage) / _ms(ours, stage)
        yield (
            f"{stage}: {Path(large['model']).name} vzip over {Path(small['model']).name} vanilla",
            tokens,
            f"{ratio:.2f}x",
        )


def _train_rows(record: Mapping[str, Any]) -> Rows:
    for name, method in record["methods"].items():
        yield (
            f"{name}: samples/s, peak GiB (estimate), hours for 66.5k",
            f"{method['num_visual_tokens']} + {record['resolved']['text_tokens']}",
            f"{method['samples_per_s']:.2f}, {method['measured_bytes'] / GIB:.2f} "
            f"({sum(method['estimated_bytes'].values()) / GIB:.2f}), {method['projected_hours']:.2f}",
        )


def _memory_rows(record: Mapping[str, Any]) -> Rows:
    for name, works in record["methods"].items():
        for work, peak in works.items():
            estimated = sum(peak["estimated_bytes"].values())
            yield (
                f"{name}, {work}: measured GiB, estimated",
                f"{peak['num_visual_tokens']} of {peak['num_tokens']}",
                f"{peak['measured_bytes'] / GIB:.3f}, {estimated / GIB:.3f} "
                f"({estimated / peak['measured_bytes'] - 1:+.1%})",
            )


def _test_rows(record: Mapping[str, Any]) -> Rows:
    yield "tests passed", "", f"{record['num_passed']} of {record['num_tests']}"


_ROWS = {"train": _train_rows, "memory": _memory_rows, "tests": _test_rows}

if __name__ == "__main__":
    sys.exit(main())
