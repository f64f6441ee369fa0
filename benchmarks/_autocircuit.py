"""AutoCircuit in a process of its own: its packages and the project's cannot share one.

Started by benchmarks.circuits with an interpreter that has auto-circuit 1.0, transformer-lens under
2 and transformers under 5. Reads a folder with `weights.safetensors`, `config.json` of a GPT-2 and
`prompts.safetensors`; then a command a line on standard input, and answers each in one line
(`answer NUMBER`): `eap` and `ig` (seconds), `run` (seconds of a forward with the edges of
`mask.safetensors` ablated), `peak` (most memory so far, in bytes), `over` (the same of the first
`eap` above what was there before), `save` (scores of the latest `eap`, the metric of the latest
`run`, to a file).
"""

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.types import AblationType
from auto_circuit.utils.ablation_activations import batch_src_ablations
from auto_circuit.utils.graph_utils import patch_mode, patchable_model
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel


def hooked(folder):
    """The GPT-2 of the folder as AutoCircuit needs it."""
    config = GPT2Config(**json.loads((folder / "config.json").read_text()))
    own = GPT2LMHeadModel(config).eval()
    own.load_state_dict(load_file(folder / "weights.safetensors"))
    settings = HookedTransformerConfig(
        n_layers=config.n_layer, d_model=config.n_embd, n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head, n_heads=config.n_head, d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size, act_fn="gelu_new", eps=config.layer_norm_epsilon,
        normalization_type="LN", original_architecture="GPT2LMHeadModel",
        use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True,
    )  # fmt: skip
    model = HookedTransformer(settings)
    model.load_state_dict(convert_gpt2_weights(own, settings), strict=False)
    # As its own loader does: else a backward would make the gradients of all weights too.
    model.requires_grad_(False)
    return model.eval(), own


class Peer:
    """The patched model and its prompts."""

    def __init__(self, folder):
        self.folder = folder
        self.found = {}
        self.over = 0
        model, own = hooked(folder)
        prompts = load_file(folder / "prompts.safetensors")
        with torch.no_grad():
            gap = model(prompts["clean"])[:, -1] - own(prompts["clean"]).logits[:, -1]
        # TransformerLens computes attention in another order, through all layers.
        assert float(gap.abs().max()) < 1e-2, f"the models differ by {float(gap.abs().max())}"
        del own
        count = len(prompts["clean"])
        data = PromptDataset(
            prompts["clean"], prompts["corrupt"],
            [prompts["answers"][i] for i in range(count)],
            [prompts["wrong"][i] for i in range(count)],
        )  # fmt: skip
        length = prompts["clean"].shape[1]
        self.data = PromptDataLoader(data, seq_len=length, diverge_idx=0, batch_size=count)
        self.prompts = prompts
        self.model = patchable_model(
            model, factorized=True, slice_output="last_seq", separate_qkv=True,
            device=torch.device("cpu"),
        )  # fmt: skip

    def eap(self):
        """Scores of all edges, as gradients of the edges' masks at 0."""
        if self.over:
            self.found |= self.gradients(mask_val=0.0)
            return
        with Watch() as watch:
            self.found |= self.gradients(mask_val=0.0)
        self.over = watch.peak - watch.before

    def ig(self):
        """Five masks between 0 and 1, of all edges together: not a line of inputs."""
        self.gradients(integrated_grad_samples=4)

    def gradients(self, **asked):
        """Its mask gradients."""
        self.model.zero_grad(set_to_none=True)
        return mask_gradient_prune_scores(
            self.model, self.data, None, "logit", "avg_diff",
            ablation_type=AblationType.RESAMPLE, clean_corrupt="corrupt", **asked,
        )  # fmt: skip

    def prepare(self):
        """What sources write on the corrupt prompts, and the masks of a circuit."""
        self.sources = batch_src_ablations(
            self.model, self.data, ablation_type=AblationType.RESAMPLE, clean_corrupt="corrupt"
        )
        self.masks = load_file(self.folder / "mask.safetensors")

    @torch.no_grad()
    def run(self):
        """The metric of each prompt with all edges outside the circuit ablated."""
        for wrapper in self.model.dest_wrappers:
            wrapper.patch_mask.data.copy_(self.masks[wrapper.module_name])
        batch = next(iter(self.data))
        with patch_mode(self.model, self.sources[batch.key]):
            logits = self.model(batch.clean)[self.model.out_slice]
        rows = torch.arange(len(logits))
        right, wrong = self.prompts["answers"][:, 0], self.prompts["wrong"][:, 0]
        self.found["metric"] = logits[rows, right] - logits[rows, wrong]
        for wrapper in self.model.dest_wrappers:
            wrapper.patch_mask.data.zero_()

    def save(self):
        """All that was found, to a file."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.found.items()}
        save_file(tensors, self.folder / "found.safetensors")


class Watch:
    """Resident memory before, and the most while it is open, watched from a thread."""

    def __enter__(self):
        self.before = self.peak = self.resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self.resident())

    @staticmethod
    def resident():
        """Bytes of this process in memory now."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def main():
    """Answer commands until there are none."""
    torch.set_num_threads(int(sys.argv[2]))
    peer = Peer(Path(sys.argv[1]))
    print("answer 0", flush=True)
    for line in sys.stdin:
        command = line.strip()
        if command == "peak":
            value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        elif command == "over":
            value = peer.over
        else:
            start = time.perf_counter()
            getattr(peer, command)()
            value = time.perf_counter() - start
        print(f"answer {value}", flush=True)


if __name__ == "__main__":
    main()
