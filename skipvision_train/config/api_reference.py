"""``docs/api.md``: what the package exports, from the signatures and docstrings in its source. Nothing is imported."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
MODULES = ("skipvision_train", "skipvision_train.inference", "skipvision_train.plans")
SECTIONS = ("Args", "Attributes", "Returns", "Raises")

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


@cache
def _tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def exported(module: str) -> list[str]:
    """``__all__`` of a module, sorted without regard to case."""
    found = _assigned(_tree(module), "__all__")
    assert found is not None, f"{module} has no __all__"
    return sorted(ast.literal_eval(found.value or ast.List([])), key=str.lower)


def _assigned(tree: ast.Module, name: str) -> ast.Assign | ast.AnnAssign | None:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node
    return None


def origin(module: str, name: str) -> tuple[str, Definition]:
    """Where a name is defined, through the packages that pass it on: the module and the definition."""
    tree = _tree(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return origin(node.module, name)
    if (constant := _assigned(tree, name)) is not None:
        return module, constant
    late = _assigned(tree, "_EXPORTS")
    assert late is not None, f"{module} does not define {name}"
    return origin(ast.literal_eval(late.value or ast.Dict([], []))[name], name)


def markdown() -> str:
    """The whole page."""
    lines = [
        "# API reference",
        "",
        "Written by `make reference` from the docstrings; a test keeps it so. What stands here changes with a note in",
        "`CHANGELOG.md`; other modules serve the commands and may change without one.",
    ]
    places: dict[tuple[str, str], str] = {}
    # what a package of its own exports stands there, and the top level refers to it
    for module in (*MODULES[1:], MODULES[0]):
        lines += ["", f"## {module}", "", *_prose(ast.get_docstring(_tree(module)) or "")]
        for name in exported(module):
            source, node = origin(module, name)
            if (source, name) in places:
                lines += ["", f"### {name}", "", f"The same as `{places[source, name]}.{name}`, above."]
                continue
            places[source, name] = module
            lines += ["", f"### {name}", "", *_definition(source, name, node)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _definition(module: str, name: str, node: Definition) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return _function(node, name)
    if isinstance(node, ast.ClassDef):
        return _class(node)
    body = _tree(module).body
    after = body[body.index(node) + 1 :][:1]
    text = after[0].value.value if after and _is_text(after[0]) else ""  # type: ignore[attr-defined]
    return ["```python", ast.unparse(node), "```", "", *_prose(inspect.cleandoc(str(text)))]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _function(node: ast.FunctionDef, name: str) -> list[str]:
    arguments = _arguments(node.args)
    returned = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return ["```python", f"{name}({arguments}){returned}", "```", "", *_prose(ast.get_docstring(node) or "")]


def _arguments(args: ast.arguments) -> str:
    text = ast.unparse(args)
    return re.sub(r"^(self|cls)(, )?", "", text)


def _class(node: ast.ClassDef) -> list[str]:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    lines = ["```python", _constructor(node, methods), "```", "", *_prose(ast.get_docstring(node) or "")]
    for method in methods:
        decorators = {ast.unparse(decorator).split("(")[0] for decorator in method.decorator_list}
        text = ast.get_docstring(method)
        if method.name.startswith("_") or text is None or any(each.endswith(".setter") for each in decorators):
            continue
        if "property" in decorators:
            returned = ast.unparse(method.returns) if method.returns is not None else "Any"
            head = ["```python", f"{node.name}.{method.name}: {returned}", "```", ""]
            lines += ["", *head, *_prose(text)]
        else:
            lines += ["", *_function(method, f"{node.name}.{method.name}")]
    return lines


def _constructor(node: ast.ClassDef, methods: list[ast.FunctionDef]) -> str:
    """How an instance is made: ``__init__``'s arguments, a data class's fields, an enumeration's members."""
    bases = {ast.unparse(base) for base in node.bases}
    if "IntEnum" in bases:
        return "\n".join(
            [f"class {node.name}(IntEnum)", *(ast.unparse(i) for i in node.body if isinstance(i, ast.Assign))]
        )
    init = next((method for method in methods if method.name == "__init__"), None)
    if init is not None:
        return f"{node.name}({_arguments(init.args)})"
    fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    if fields:
        return f"{node.name}({', '.join(field for field in fields if 'ClassVar' not in field)})"
    return f"class {node.name}({', '.join(sorted(bases))})" if bases else f"class {node.name}"


def _prose(text: str) -> list[str]:
    """A docstring as Markdown: its sections as lists."""
    text = re.sub(r":(?:class|func|mod|data|meth|attr):`~?\.?([^`]*)`", r"`\1`", text).replace("``", "`")
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        title = line.strip().removesuffix(":")
        if line.endswith(":") and title in SECTIONS:
            inside = True
            lines += ["", f"*{title}*", ""]
        elif inside and line.startswith("    ") and not line.startswith("     "):
            item = re.match(r"    (\*{0,2}[\w.]+): (.*)", line)
            lines.append(f"* `{item[1]}`: {item[2]}" if item else f"* {line.strip()}")
        elif inside and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return lines


if __name__ == "__main__":
    (PACKAGE.parent / "docs" / "api.md").write_text(markdown())
