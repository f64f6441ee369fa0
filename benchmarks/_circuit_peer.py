"""AutoCircuit beside attnlens: the prompts, and its process with the same weights and prompts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks._shared import THREADS, random_ids

PROMPTS, LENGTH = 16, 16
INPUTS = {"q": "q_input", "k": "k_input", "v": "v_input", "mlp": "mlp_in"}


def prompts() -> dict[str, Any]:
    """Clean and corrupt ids, and an answer and a wrong one of each."""
    import torch

    ids = random_ids((2 * PROMPTS, LENGTH))
    graded = torch.randint(0, 50000, (PROMPTS, 2), generator=torch.Generator().manual_seed(2))
    parts = {"clean": ids[:PROMPTS], "corrupt": ids[PROMPTS:]}
    parts |= {"answers": graded[:, :1], "wrong": graded[:, 1:]}
    return {name: part.contiguous() for name, part in parts.items()}


def half(lens: Any, seed: int = 0) -> Any:
    """A random half of the edges."""
    import torch

    exists = lens.wiring.network.exists
    draw = torch.Generator().manual_seed(seed)
    return exists & (torch.rand(exists.shape, generator=draw) < 0.5)


class Peer:
    """AutoCircuit in its own process; a command a line, an answer a line."""

    def __init__(self, python: str, lens: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        self.folder = folder
        self._network = lens.wiring.network
        weights = {name: t.clone().contiguous() for name, t in lens.model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        save_file(prompts(), folder / "prompts.safetensors")
        config = lens.model.config
        sizes = {"n_layer": config.n_layer, "n_positions": config.n_positions}
        (folder / "config.json").write_text(json.dumps(sizes | {"bos_token_id": 0}))
        ablated = (~half(lens)).float()
        masks = {name: ablated[:rows, columns].T for name, rows, columns in self._modules()}
        masks = {n: (m if m.shape[0] > 1 else m[0]).contiguous() for n, m in masks.items()}
        save_file(masks, folder / "mask.safetensors")
        script = Path(__file__).with_name("_autocircuit.py")
        with (folder / "errors").open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(script), str(folder), str(THREADS)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._answer()

    def ask(self, command: str) -> float:
        """Give a command; what is measured of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.split()[1]
        raise SystemExit(f"the peer's process ended:\n{(self.folder / 'errors').read_text()}")

    def close(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def found(self) -> tuple[Any, Any]:
        """Scores `sender receiver` of the latest `eap`, and the metric of the latest `run`."""
        import torch
        from safetensors.torch import load_file

        self.ask("save")
        tensors = load_file(self.folder / "found.safetensors")
        scores = torch.zeros(self._network.exists.shape, dtype=torch.float64)
        for name, rows, columns in self._modules():
            own = tensors[name].reshape(len(columns), rows)
            # Its loss is the metric's negative, a mean over prompts.
            scores[:rows, columns] = -own.T.double()
        return scores, tensors["metric"]

    def _modules(self) -> list[tuple[str, int, list[int]]]:
        """Its modules that read, how many senders each sees, and the receivers that it is."""
        found: dict[str, list[int]] = {}
        for number, receiver in enumerate(self._network.receivers):
            name = f"blocks.{receiver.layer}.hook_{INPUTS.get(receiver.kind)}"
            if receiver.kind == "logits":
                name = f"blocks.{receiver.layer - 1}.hook_resid_post"
            found.setdefault(name, []).append(number)
        exists = self._network.exists
        return [(name, int(exists[:, own[0]].sum()), own) for name, own in found.items()]
