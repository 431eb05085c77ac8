"""A small recording in every foreign format, written by hand as the systems write it, never by moesim's own writers.

Each function takes a folder and returns the path to import; what must come out is computed here from IDS and LOADS.
"""

import base64
import io
import json

import numpy as np
import torch
from safetensors.numpy import save_file

from moesim.traces import load_LE

T, L, K, E = 12, 3, 2, 8
RNG = np.random.default_rng(7)
IDS = RNG.random((T, L, E)).argsort(axis=2)[..., :K].astype(np.int32)
"""[T, L, K] what every token chose."""
WEIGHTS = RNG.integers(1, 64, (T, L, K)) / 64
TOKENS = RNG.integers(0, 90, T)
STEPS = np.stack([load_LE(IDS[i : i + 4], E) for i in range(0, T, 4)])
"""[3, L, E] loads of three steps of four tokens."""
TOTAL = STEPS.sum(axis=0)
MAP = np.stack([np.r_[RNG.permutation(E), RNG.integers(0, E, 2)] for _ in range(L)])
"""[L, P] two redundant physical experts."""


def physical(load_LE_):
    """[L, P] the load of each expert on its first physical copy, a third of it on the second where there is one."""
    out = np.zeros(MAP.shape, np.int32)
    for layer, row in enumerate(MAP):
        for expert in range(E):
            places = np.flatnonzero(row == expert)
            rest = load_LE_[layer, expert] // 3 if len(places) > 1 else 0
            out[layer, places[-1]] += rest
            out[layer, places[0]] += load_LE_[layer, expert] - rest
    return out


def physical_ids():
    """[T, L, K] the first physical copy of what every token chose."""
    return np.stack(
        [np.argsort(MAP[i], kind="stable")[np.searchsorted(np.sort(MAP[i]), IDS[:, i])] for i in range(L)], 1
    )


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def vllm_npy(folder):
    np.save(folder / "request.npy", IDS.astype(np.uint8))
    return folder / "request.npy"


def vllm_folder(folder):
    (folder / "routed").mkdir()
    np.save(folder / "routed/a.npy", IDS[:5].astype(np.uint16))
    np.save(folder / "routed/b.npy", IDS[5:].astype(np.uint16))
    return folder / "routed"


def vllm_responses(folder):
    def response(ids, tokens, prompt):
        text = base64.b64encode(npy_bytes(ids)).decode()
        told = [int(t) for t in tokens[prompt:]] + [1]
        choice = {"index": 0, "routed_experts": text, "token_ids": told}
        return {"prompt_token_ids": [int(t) for t in tokens[:prompt]], "choices": [choice]}

    return lines(folder / "out.jsonl", [response(IDS[:7], TOKENS[:7], 4), response(IDS[7:], TOKENS[7:], 5)])


def sglang_requests(folder):
    text = base64.b64encode(IDS.astype("<i4").tobytes()).decode()
    return lines(folder / "sg.jsonl", [{"meta_info": {"prompt_tokens": 10, "routed_experts": text}}])


def sglang_stat(folder):
    """Ring buffer of five steps with two unfilled, layers 0 and 2 dense, repeated by two ranks."""
    count = np.zeros((5, 5, E), np.int32)
    count[:3, [1, 3, 4]] = STEPS
    for rank in (0, 1):
        about = {"rank": rank, "logical_count": torch.from_numpy(count), "average_utilization_rate_over_window": 0.5}
        torch.save(about, folder / f"expert_distribution_recorder_17.{rank}.pt")
    return folder


def _sglang_records(folder, records_of_rank):
    for rank, records in enumerate(records_of_rank):
        value = {"records": records, "last_physical_to_logical_map": torch.from_numpy(MAP)}
        torch.save(value, folder / f"expert_distribution_recorder_17_{rank}.pt")
    return folder


def sglang_per_pass(folder):
    def record(number, rank, count):
        part = torch.from_numpy(count)
        return {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "global_physical_count": part}

    parts = [physical(step) for step in STEPS]
    shares = [[part - part // 4 for part in parts], [part // 4 for part in parts]]
    return _sglang_records(folder, [[record(i + 3, r, s) for i, s in enumerate(shares[r])] for r in (0, 1)])


def sglang_per_token(folder):
    """Two requests of 5 and 4 prompt tokens in one pass with a row of padding, then a decode step of each, then one."""
    ids = np.full((L, T + 1, 8), -1, np.int32)
    ids[:, :T, :K] = physical_ids().transpose(1, 0, 2)

    def record(number, rows, mode, positions, lengths, padding=0):
        picked = ids[:, [*rows, *[T] * padding]]
        return {
            "forward_pass_id": number,
            "rank": 0,
            "gatherer_key": "primary",
            "global_physical_count": torch.zeros(MAP.shape, dtype=torch.int32),
            "input_ids": torch.tensor([*TOKENS[list(rows)], *[0] * padding]),
            "positions": torch.tensor([*positions, *[0] * padding]),
            "extend_seq_lens": lengths,
            "forward_mode": mode,
            "topk_ids_of_layer": torch.from_numpy(picked),
        }

    return _sglang_records(folder, [[
        record(0, range(9), 1, [0, 1, 2, 3, 4, 0, 1, 2, 3], [5, 4], padding=1),
        record(1, [9, 10], 2, [5, 4], None),
        record(2, [11], 2, [5], None),
    ]])  # fmt: skip


def sglang_plan(folder):
    (folder / "loads.json").write_text(json.dumps({"logical_count": STEPS.tolist()}))
    return folder / "loads.json"


def vllm_loads(folder):
    records = [{"record_type": "eplb_initial_mapping", "version": 1, "num_slots": 10, "num_redundant_experts": 2}]
    for step, load in enumerate(STEPS):
        records.append({
            "record_type": "eplb_load_stats",
            "version": 1,
            "step": step,
            "num_ranks": 2,
            "num_layers": L,
            "expert_load": physical(load).tolist(),
            "p2l_map": MAP.tolist(),
            "tokens": [[2, 2]] * L,
        })  # fmt: skip
    return lines(folder / "loads.jsonl", records)


def tensorrt(folder):
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": E, "num_experts_per_token": K}))
    for rank in (0, 1):
        shares = STEPS // 3 if rank else STEPS - STEPS // 3
        save_file(
            {f"{100 + s}_{i + 3}": shares[s, i].copy() for s in range(3) for i in range(L)},
            folder / f"rank{rank}.safetensors",
        )
    return folder


def megatron(folder):
    """Two data-parallel ranks with two tokens a step each, and a third that repeats the first."""
    for rank in (0, 1, 2):
        records = []
        for step in range(3):
            at = step * 4 + (rank % 2) * 2
            for layer in range(L):
                chosen = IDS[at : at + 2, layer].tolist()
                about = {"step": step, "stage": "forward", "block": "decoder", "layer": layer + 1, "rank": rank}
                records.append({**about, "num_tokens": 2, "topk": K, "top_indices": chosen})
        lines(folder / f"rank_{rank}.jsonl", records)
    return folder


def esft(folder):
    for layer in range(L):
        out = []
        for begin, end in ((0, 5), (5, T)):
            ids, weights = IDS[begin:end, layer].ravel(), WEIGHTS[begin:end, layer].ravel()
            out.append("\t".join([*map(str, ids), "", *map(str, weights)]) + "\n")
        (folder / f"expert_weights_{layer + 1}.txt").write_text("".join(out))
    return folder


def npz(folder):
    np.savez(
        folder / "law.npz",
        topk_ids=IDS.astype(np.uint8),
        topk_weights=WEIGHTS.astype(np.float16),
        seq_lens=np.array([5, 7], np.int32),
        layer_ids=np.array([1, 2, 4]),
    )
    return folder / "law.npz"


def moe_balance(folder):
    for name, begin, end, prompt in (("a", 0, 7, 4), ("b", 7, T, 3)):
        np.savez(
            folder / f"{name}.npz",
            request_id=np.array(3),
            prompt_token_ids=TOKENS[begin : begin + prompt],
            output_token_ids=np.r_[TOKENS[begin + prompt : end], 1],
            routed_experts=IDS[begin:end],
        )
    return folder


def jsonl(folder):
    """Two requests whose tokens come in turn, layers in any order."""
    records = [{"meta": {"model": "m"}, "layers": [1, 2, 5]}]
    order = [t for pair in zip(range(5), range(5, 10), strict=True) for t in pair] + [10, 11]
    for t in order:
        request, position = ("x", t) if t < 5 else ("y", t - 5)
        for i in (2, 0, 1):
            row = {"req_id": request, "token_idx": position, "layer": [1, 2, 5][i], "topk_ids": IDS[t, i].tolist()}
            records.append({**row, "topk_weights": WEIGHTS[t, i].tolist()})
    return lines(folder / "log.jsonl", records)


def deepseek(folder):
    torch.save(torch.from_numpy(TOTAL).float(), folder / "weight.pt")
    return folder / "weight.pt"


def moe_infinity(folder):
    np.save(folder / "eam.npy", STEPS.astype(np.float32))
    return folder / "eam.npy"


def load_csv(folder):
    rows = [f"{layer},{expert},{TOTAL[layer, expert]}" for layer in range(L) for expert in range(E)]
    (folder / "loads.csv").write_text("\n".join(["layer_id,expert_id,count", *rows]) + "\n")
    return folder / "loads.csv"


def llamacpp(folder):
    rows = [f"{layer},{expert}" for token in IDS for layer, chosen in enumerate(token) for expert in chosen]
    (folder / "experts.csv").write_text("\n".join(["layer,expert", *rows]) + "\n")
    return folder / "experts.csv"


SAMPLES = {
    "vllm": (vllm_npy, vllm_folder, vllm_responses),
    "sglang-requests": (sglang_requests,),
    "sglang": (sglang_stat, sglang_per_pass, sglang_per_token, sglang_plan),
    "vllm-loads": (vllm_loads,),
    "tensorrt": (tensorrt,),
    "megatron": (megatron,),
    "esft": (esft,),
    "npz": (npz,),
    "moe-balance": (moe_balance,),
    "jsonl": (jsonl,),
    "deepseek": (deepseek,),
    "moe-infinity": (moe_infinity,),
    "load-csv": (load_csv,),
    "llamacpp": (llamacpp,),
}
"""Format to its samples; Parquet is moesim's own and has none."""

PAIRS = [(name, sample) for name, samples in SAMPLES.items() for sample in samples]
