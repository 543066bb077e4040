"""Every form of a Python trigger, in one process under the library: run by forms_test.sh, which makes the
package `zoo` importable. What an allocation would get is asked of the library itself."""

import asyncio
import contextlib
import ctypes
import gc
import importlib
import inspect
import pickle
import sys
import threading
import unittest
import warnings

library = ctypes.CDLL(None)
library.dormouse_region_depth.restype = ctypes.c_size_t
library.dormouse_current_tag.restype = ctypes.c_char_p


def tag():
    return library.dormouse_current_tag().decode()


def depth():
    return library.dormouse_region_depth()


sys.modules["zoo_probe"] = probe = type(sys)("zoo_probe")
probe.tag = tag

import zoo.animals as zoo  # noqa: E402
from zoo.animals import load  # noqa: E402  what others import is the wrapper too


def spec_by_loader(name, path):
    import importlib.util

    return importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, path))


class Forms(unittest.TestCase):
    def tearDown(self):
        self.assertEqual((tag(), depth()), ("", 0), "the test leaves no region behind")

    def test_a_function_is_a_region(self):
        self.assertEqual(load(1, b=2), ("weights", 1, 2))
        self.assertEqual(zoo.not_named(), "")

    def test_an_exception_ends_the_region_and_arrives_unchanged(self):
        with self.assertRaises(KeyError) as caught:
            zoo.fail()
        self.assertEqual(caught.exception.args, ("weights",))

    def test_methods_of_every_kind(self):
        cage = zoo.Cage()
        self.assertEqual(cage.method(1), ("weights", cage, 1))
        self.assertEqual(zoo.Cage.build(2), ("weights", zoo.Cage, 2))
        self.assertEqual(cage.build(2), ("weights", zoo.Cage, 2))
        self.assertEqual(zoo.Cage.helper(3), ("weights", 3))
        self.assertEqual(zoo.Cage.Inner().deep(), "kv_cache")

    def test_an_inherited_method_is_a_region_for_the_named_class_alone(self):
        self.assertEqual(zoo.Small().inherited(), "weights")
        self.assertEqual(zoo.Cage().inherited(), "")

    def test_constructing_a_class_is_a_region(self):
        made = zoo.Made(7)
        self.assertEqual((made.seen, made.number, tag()), ("weights", 7, ""))
        self.assertIsInstance(made, zoo.Made)
        self.assertEqual(zoo.MadeNew(7).seen, "weights")
        self.assertEqual(pickle.loads(pickle.dumps(made)).number, 7)

    def test_nested_regions_end_innermost_first(self):
        self.assertEqual(zoo.outer(), ["weights", "kv_cache", "weights"])

    def test_a_generator_is_a_region_only_while_it_runs(self):
        generator = zoo.count(3)
        seen = []
        for each in generator:
            seen.append((each, tag()))
        self.assertEqual(seen, [("weights", "")] * 3)

    def test_a_generator_takes_values_and_exceptions_and_returns(self):
        def delegate():
            result.append((yield from zoo.talk()))

        result = []
        generator = delegate()
        self.assertEqual(next(generator), ("weights", None))
        self.assertEqual(generator.send("x"), ("weights", "x"))
        self.assertEqual(generator.throw(ValueError("v")), ("weights", "v"))
        with self.assertRaises(StopIteration):
            generator.send("stop")
        self.assertEqual(result, ["done"])

    def test_a_generator_closed_early_cleans_up_in_its_region(self):
        zoo.log.clear()
        generator = zoo.count(3)
        next(generator)
        generator.close()
        self.assertEqual(zoo.log, ["closed in weights"])
        next(left := zoo.count(3))
        del left
        gc.collect()
        self.assertEqual(zoo.log, ["closed in weights"] * 2)

    def test_interleaved_generators_keep_to_themselves(self):
        first, second = zoo.count(4), zoo.count_kv(4)
        seen = [next(each) for each in (first, second, first, second, second, first)]
        self.assertEqual(seen, ["weights", "kv_cache", "weights", "kv_cache", "kv_cache", "weights"])

    def test_a_coroutine_is_a_region_only_while_it_runs(self):
        async def main():
            return await asyncio.gather(zoo.fetch(), zoo.watch(), zoo.fetch_kv())

        self.assertEqual(asyncio.run(main()), [["weights"] * 4, [""] * 4, ["kv_cache"] * 4])

    def test_a_cancelled_coroutine_cleans_up_in_its_region(self):
        async def main():
            task = asyncio.ensure_future(zoo.fetch_forever())
            await asyncio.sleep(0)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            return tag()

        zoo.log.clear()
        self.assertEqual(asyncio.run(main()), "")
        self.assertEqual(zoo.log, ["cancelled in weights"])

    def test_an_async_generator_is_a_region_only_while_it_runs(self):
        async def main():
            seen = []
            async for each in zoo.stream(3):
                seen.append((each, tag()))
            early = zoo.stream(3)
            await early.__anext__()
            await early.aclose()
            return seen

        zoo.log.clear()
        self.assertEqual(asyncio.run(main()), [("weights", "")] * 3)
        self.assertEqual(zoo.log, ["stream ends in weights"] * 2)

    def test_functions_that_return_what_runs_later(self):
        self.assertEqual(asyncio.run(zoo.decorated()), ["weights"] * 4)
        self.assertEqual(list(zoo.returns_generator(2)), ["weights"] * 2)

    def test_a_context_manager_function_is_a_region_from_enter_to_exit(self):
        with zoo.keeper("a") as got:
            self.assertEqual((got, tag()), (("weights", "a"), "weights"))
        with self.assertRaises(ZeroDivisionError):
            with zoo.keeper("b"):
                1 / 0
        self.assertEqual(tag(), "")
        self.assertIsInstance(zoo.keeper("c"), contextlib.AbstractContextManager)

        @zoo.keeper("d")
        def inside():
            return tag()

        self.assertEqual([inside(), inside()], ["weights"] * 2)

    def test_an_async_context_manager_function(self):
        async def main():
            async with zoo.async_keeper() as got:
                return got, tag()

        self.assertEqual(asyncio.run(main()), ("weights", "weights"))

    def test_a_context_manager_class_is_a_region_from_enter_to_exit(self):
        gate = zoo.Gate()
        self.assertEqual(gate.made, "")
        with gate as got:
            self.assertEqual((got, tag()), ("weights", "weights"))
        with zoo.Gate(), zoo.Gate():
            self.assertEqual(depth(), 2)

    def test_an_unfinished_region_inside_does_not_end_ours(self):
        self.assertEqual(zoo.leaks_a_region(), "inner")
        self.assertEqual(tag(), "inner")  # the program's own, which it ends later
        library.dormouse_region_end()

    def test_threads_have_regions_of_their_own(self):
        start, stop, seen = threading.Event(), threading.Event(), []
        thread = threading.Thread(target=zoo.hold, args=(start, stop, seen))
        thread.start()
        start.wait()
        self.assertEqual(tag(), "")
        stop.set()
        thread.join()
        self.assertEqual(seen, ["weights"])

    def test_a_wrapped_function_looks_like_the_function(self):
        self.assertEqual(str(inspect.signature(load)), "(a, *, b=2)")
        self.assertEqual((load.__name__, load.__module__, load.__doc__), ("load", "zoo.animals", "Loads."))
        self.assertIs(pickle.loads(pickle.dumps(load)), load)
        self.assertIn("def load(a", inspect.getsource(load))
        self.assertTrue(inspect.iscoroutinefunction(zoo.fetch))
        self.assertTrue(inspect.isgeneratorfunction(zoo.count))
        self.assertTrue(inspect.isasyncgenfunction(zoo.stream))
        self.assertEqual(str(inspect.signature(zoo.Made)), "(number)")
        self.assertEqual(inspect.getfullargspec(load)[:6:3], (["a"], None))
        self.assertEqual((load.__kwdefaults__, load.__code__.co_argcount, load.__code__.co_name), ({"b": 2}, 1, "load"))
        self.assertEqual(zoo.with_all_parameters(1, 2, 3, 4, e=5, f=6), (1, 2, (3, 4), 7, 5, {"f": 6}, "weights"))
        self.assertEqual(zoo.with_all_parameters.__defaults__, (8,))

    def test_who_had_the_function_before_has_the_region_and_can_pickle_it(self):
        self.assertEqual(zoo.registry["registered"](), "weights")
        self.assertIs(pickle.loads(pickle.dumps(zoo.registry["registered"])), zoo.registered)
        self.assertEqual(zoo.closure(), ("weights", "kept"))

    def test_a_function_copied_by_value_runs_without_a_region(self):
        """As cloudpickle does it: with the constants of its code, which need not know this library."""
        for function in (load, zoo.count, zoo.fetch, zoo.stream, zoo.Gate.__enter__):
            helpers = [each for each in function.__code__.co_consts if type(each).__name__ == "_Helper"]
            self.assertTrue(helpers)
            for each in helpers:
                copy = pickle.dumps(each)
                self.assertNotIn(b"dormouse", copy)
                self.assertEqual(pickle.loads(copy)("tag", "what"), "what")

    def test_a_warning_is_the_callers(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zoo.warns()
        self.assertEqual(caught[0].filename, __file__)

    def test_a_context_manager_that_is_dropped_ends_its_region(self):
        gate = zoo.Gate()
        gate.__enter__()
        keeper = zoo.keeper("a")
        keeper.__enter__()
        self.assertEqual(depth(), 2)
        del gate, keeper
        gc.collect()
        self.assertEqual(depth(), 0)

    def test_what_a_module_makes_when_asked_is_followed_then(self):
        import zoo.lazy
        import zoo.lazier

        self.assertNotIn("zoo.heavy", sys.modules)
        self.assertEqual(zoo.lazy.Heavy().method(), "weights")
        self.assertEqual([zoo.lazier.function(), zoo.lazier.function()], ["weights"] * 2)
        self.assertEqual(zoo.heavy.function(), "")

    def test_a_module_that_the_program_loads_from_a_file_is_followed(self):
        import importlib.util

        for name, make in (("from_a_file", importlib.util.spec_from_file_location), ("by_a_loader", spec_by_loader)):
            spec = make(name, zoo.__file__.replace("animals", "late"))
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.assertEqual(module.function(), "weights", name)
            self.assertEqual(type(module.__loader__).__name__, "SourceFileLoader")

    def test_a_cached_function_keeps_its_cache(self):
        zoo.cached.cache_clear()
        self.assertEqual([zoo.cached(1), zoo.cached(1)], ["weights"] * 2)
        self.assertEqual(zoo.cached.cache_info().hits, 1)

    def test_a_reloaded_module_is_followed_once(self):
        module = importlib.import_module("zoo.reloaded")
        self.assertEqual(module.depth_inside(depth), 1)
        self.assertEqual(importlib.reload(module).depth_inside(depth), 1)

    def test_a_module_behind_another_finder_is_followed(self):
        class Greedy:
            def find_spec(self, name, path=None, target=None):
                if name != "zoo.late":
                    return None
                return importlib.machinery.PathFinder.find_spec(name, path)

        sys.meta_path.insert(0, finder := Greedy())
        try:
            import zoo.late as late
        finally:
            sys.meta_path.remove(finder)
        self.assertEqual(late.function(), "weights")
        self.assertEqual(type(late.__loader__).__name__, "SourceFileLoader")


unittest.main(argv=["forms", "-v"] if "-v" in sys.argv else ["forms"])
