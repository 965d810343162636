"""Merge two LoRA adapters of one base model into one adapter, without a search.

    python examples/merge_two_adapters.py BASE FIRST SECOND OUT

BASE is a hub id or a folder; FIRST and SECOND are folders as PEFT saves them, or ORG/NAME on the hub.
"""

import sys

import memmcl


def main(base: str, first: str, second: str, out: str) -> None:
    """Write OUT/sum, their weighted sum, and OUT/ties, their merge by TIES as an adapter of rank 16."""
    experts = {"first": first, "second": second}

    weighted = memmcl.merge_experts(base, experts, weights={"first": 1.0, "second": 0.5})
    print(weighted)
    weighted.save(f"{out}/sum")  # exact: the ranks of both adapters, concatenated

    ties = memmcl.merge_experts(base, experts, method="ties", parameters={"density": 0.3}, rank=16)
    record = ties.save(f"{out}/ties")  # the nearest adapter of rank 16
    print(f"relative error of the compression, mean over modules: {record['errors']['mean']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
