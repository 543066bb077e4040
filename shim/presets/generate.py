"""Reads the presets' files while the library is built, and prints C++: with `table`, the rows of config/presets.cc;
with `sources`, the files' own text for shim/rules/python_rules.cc. Usage: generate.py table|sources FILE...

A preset's file is Python that runs inside the program (see rules/python_rules.py) and begins with its table, and before it
the constants that several presets have in common:

    PRESETS = {
        "name": {                        # as written after the @
            "program": "...", "versions": "...",
            "help": "...",               # what the preset is for
            "rules": {ITEM: HELP},       # items of DORMOUSE_REGIONS, read as if they had been typed
            "rules of some versions": {ITEM: HELP},  # may be left out; no message where one does not fit
            "triggers": {MODULE: (FUNCTION, HELP)},
            "kept": {TAG: WHY},          # may be left out; content that the program cannot lose, whatever the list says
        }
    }

A trigger is what rules cannot say: FUNCTION of the same file is called when MODULE has been imported.
"""

import ast
import json
import pathlib
import sys


OPTIONAL = "rules of some versions"
FIELDS = {"program", "versions", "help", "rules", OPTIONAL, "triggers", "kept"}


def table_of(path):
    tree = ast.parse(path.read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    constants = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        name = node.targets[0].id
        constants[name] = eval(compile(ast.Expression(node.value), path, "eval"), {"__builtins__": {}}, constants)
        if name == "PRESETS":
            table = constants[name]
            for preset in table.values():
                preset.setdefault(OPTIONAL, {})
                preset.setdefault("kept", {})
                assert set(preset) == FIELDS, (path, set(preset) ^ FIELDS)
                for function, _ in preset["triggers"].values():
                    assert function in functions, f"{path} has no function {function}"
            return table
    raise SystemExit(f"{path}: there is no PRESETS")


def text(value):
    return json.dumps(value)  # as C++ writes it, for ASCII; true and false too


def listed(rows):
    return "{" + ", ".join("{" + ", ".join(text(each) for each in row) + "}" for row in rows) + "}"


def row(name, preset, path):
    fields = [text(name), text(preset["program"]), text(preset["versions"]), text(preset["help"])]
    rules = [(*each, False) for each in preset["rules"].items()] + [(*each, True) for each in preset[OPTIONAL].items()]
    fields.append(listed(rules))
    fields.append(listed((module, *trigger) for module, trigger in preset["triggers"].items()))
    fields.append(listed(preset["kept"].items()))
    return "{" + ", ".join([*fields, text(path.stem)]) + "},"


def main(what, *files):
    for path in map(pathlib.Path, files):
        if what == "sources":
            print("{" + text(path.stem) + ', R"DORMOUSE(' + path.read_text() + ')DORMOUSE"},')
            continue
        for name, preset in table_of(path).items():
            print(row(name, preset, path))


main(*sys.argv[1:])
