"""torch.compile of code that calls functions which are regions. Run by run.sh, without a GPU."""

import ctypes
import pathlib
import sys
import tempfile
import unittest

import torch

library = ctypes.CDLL(None)
library.dormouse_region_depth.restype = ctypes.c_size_t

MODULE = """
import ctypes

depth = ctypes.CDLL(None).dormouse_region_depth
seen = []


def twice(x, by=2):
    return x * by


def look():
    seen.append(depth())
"""

folder = tempfile.TemporaryDirectory()
pathlib.Path(folder.name, "compiled.py").write_text(MODULE)
sys.path.insert(0, folder.name)
import compiled  # noqa: E402


def caller(x):
    return compiled.twice(x) + 1


def caller_with_a_break(x):
    compiled.look()
    return compiled.twice(x) + 1


class Compile(unittest.TestCase):
    def setUp(self):
        torch._dynamo.reset()
        self.graphs = 0

    def backend(self, graph, example):
        self.graphs += 1
        return graph.forward

    def test_a_region_inside_breaks_no_graph(self):
        result = torch.compile(caller, backend=self.backend, fullgraph=True)(torch.ones(3))
        self.assertEqual((result.tolist(), self.graphs), ([3.0] * 3, 1))

    def test_a_function_that_is_a_region_compiles(self):
        for fullgraph in (True, False):
            torch._dynamo.reset()
            result = torch.compile(compiled.twice, backend=self.backend, fullgraph=fullgraph)(torch.ones(3), by=3)
            self.assertEqual(result.tolist(), [3.0] * 3)
        self.assertEqual(self.graphs, 2)

    def test_what_is_called_outside_of_the_graph_is_a_region(self):
        compiled.seen.clear()
        result = torch.compile(torch._dynamo.disable(caller_with_a_break), backend=self.backend)(torch.ones(3))
        self.assertEqual((result.tolist(), compiled.seen), ([3.0] * 3, [1]))


unittest.main()
