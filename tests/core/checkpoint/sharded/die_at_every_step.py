"""Saves to a store again and again, dying one change to the store later each time; prints what is there afterwards."""

import os
import sys

import fsspec
import test_remote
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

CHANGES = ("makedirs", "mkdir", "rm", "rm_file", "mv", "cp_file", "pipe_file")


class Dying(DirFileSystem):
    """A store on a local folder. What is written is there at once; the process ends before change number ``left``."""

    protocol = "dying"
    left = 10**9

    def __init__(self, **kwargs):
        super().__init__(path=sys.argv[1], fs=LocalFileSystem(), **kwargs)

    def open(self, path, mode="rb", **kwargs):
        if "w" in mode:
            self.change()
        return open(self._join(self._strip_protocol(path)), mode)

    @classmethod
    def change(cls):
        cls.left -= 1
        if cls.left < 0:
            os._exit(9)


def counted(name):
    def change(self, *args, **kwargs):
        self.change()
        return getattr(DirFileSystem, name)(self, *args, **kwargs)

    return change


for name in CHANGES:
    setattr(Dying, name, counted(name))


def die_after(changes):
    child = os.fork()
    if child == 0:
        Dying.left = changes
        test_remote.save("dying://ck", 2.0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    torch.set_num_threads(1)
    fsspec.register_implementation("dying", Dying)
    step, code = 0, 9
    while code == 9:
        test_remote.save("dying://ck", 1.0)
        complete = test_remote.names("dying://ck")
        code = die_after(step)
        print(test_remote.value("dying://ck"))
        test_remote.save("dying://ck", 3.0)
        assert test_remote.value("dying://ck") == 3.0
        left = test_remote.names("dying://ck")
        assert len(left) == len(complete), left
        step += 1
    assert code == 0, code


if __name__ == "__main__":
    main()
