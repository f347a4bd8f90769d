"""Releasing OpenMP workers: with more workers than cores, they would sleep after every operation."""

import os
import threading

import torch

from agl_trainer.model.cpu.openmp import release_openmp_workers


def compute() -> None:
    torch.randn(512, 512) @ torch.randn(512, 512)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_released_workers_have_ended() -> None:
    found: list[int] = []

    def work() -> None:
        found.append(threads())
        for _ in range(2):
            compute()
            found.append(threads())
            release_openmp_workers()
            found.append(threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    alone, *rest = found
    assert rest == [alone + torch.get_num_threads() - 1, alone] * 2
