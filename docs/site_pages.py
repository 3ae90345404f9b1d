"""The pages of functions and modules, found by their files, and what becomes of links in pages of Markdown."""

import ast
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from docutils import nodes
from sphinx.addnodes import pending_xref

import torchops.integrations

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torchops"
API = ROOT / "docs" / "api"
INTEGRATIONS = sorted((PACKAGE / "integrations").glob("[!_]*.py"))

# By full name the definition of a public function or class.
Public = dict[str, ast.FunctionDef | ast.ClassDef]


def write_api() -> list[str]:
    """Writes docs/api: a page for each function and module, one for each family, and a list of these.

    Returns the names that have a page.
    """
    public: Public = {}
    families = {}

    def page(title: str, module: str, sections: dict[str, Public]) -> str:
        for members in sections.values():
            public.update(members)
        return family_page(title, module, sections)

    sources = sorted((PACKAGE / "reference").glob("[!_]*.py"))
    for path in sources:
        family = path.stem
        functions = public_of("torchops", sorted((PACKAGE / "ops").glob(f"{family}*.py")))
        modules = public_of("torchops.nn", sorted((PACKAGE / "nn").glob(f"{family}*.py")))
        source = f".. literalinclude:: ../../torchops/reference/{path.name}\n   :language: python\n"
        text = page(family, f"torchops.ops.{family}", {"Functions": functions, "Modules": modules})
        families[family] = f"{text}\n{heading('In plain PyTorch', '-')}\n{source}"
    distributed = public_of("torchops.distributed", sorted((PACKAGE / "distributed").glob("[!_]*.py")))
    families["distributed"] = page("distributed", "torchops.distributed", {"Functions and modules": distributed})
    by_library = {path.stem: public_of(f"torchops.integrations.{path.stem}", [path]) for path in INTEGRATIONS}
    integrations = {library: members for library, members in by_library.items() if members}
    families["integrations"] = page("integrations", "torchops.integrations", integrations)
    shared = public_of("torchops", [*outside_of(sources, "ops"), PACKAGE / "decompositions.py"])
    shared |= public_of("torchops.nn", outside_of(sources, "nn"))
    families["utils"] = page("utils", "torchops.flops", {"For all families": shared})
    families["utils"] += "\n.. automodule:: torchops.utils\n"

    pages = families | {name: object_page(name, node) for name, node in public.items()}
    modules = "\n.. py:module:: torchops.nn\n\n.. py:module:: torchops.reference\n\n.. automodule:: torchops\n"
    pages["index"] = f"{heading('API', '=')}{modules}   :no-members:\n{toctree(families, depth=2)}"
    API.mkdir(exist_ok=True)
    for path in API.iterdir():
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = API / f"{name}.rst"
        if not path.exists() or path.read_text() != text:  # Sphinx reads again what has changed
            path.write_text(text)
    return list(public)


def public_of(package: str, paths: Sequence[Path]) -> Public:
    """What the modules define and export, by the name under which a user knows it."""
    found: Public = {}
    for path in paths:
        body = ast.parse(path.read_text()).body
        defined = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "__all__":
                exported = [name for name in ast.literal_eval(node.value) if name in defined]
                found |= {f"{package}.{name}": defined[name] for name in exported}
    return found


def outside_of(families: Sequence[Path], folder: str) -> list[Path]:
    """The modules of a folder that belong to no family."""
    names = tuple(path.stem for path in families)
    return [path for path in sorted((PACKAGE / folder).glob("*.py")) if not path.name.startswith(names)]


def family_page(title: str, module: str, sections: dict[str, Public]) -> str:
    text = f"{heading(title, '=')}\n.. automodule:: {module}\n   :no-members:\n"
    for name, members in sections.items():
        package = next(iter(members)).rpartition(".")[0]  # in which sentences name their neighbours
        lines = [f"- :py:obj:`~{full}`: {first_sentence(node)}\n" for full, node in members.items()]
        text += f"\n{heading(name, '-')}\n.. currentmodule:: {package}\n\n{''.join(lines)}{toctree(members)}"
    return text


def object_page(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    module, _, short = name.rpartition(".")
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    title = heading(short.replace("_", r"\_"), "=")
    return f"{title}\n.. currentmodule:: {module}\n\n.. auto{kind}:: {short}\n"


def first_sentence(node: ast.FunctionDef | ast.ClassDef) -> str:
    return re.split(r"(?<=\.)\s|:?\n\n|::", ast.get_docstring(node) or "")[0].replace("\n", " ")


def heading(text: str, underline: str) -> str:
    return f"{text}\n{underline * len(text)}\n"


def toctree(names: Sequence[str], depth: int = 1) -> str:
    hidden = "   :hidden:\n" if depth == 1 else ""
    entries = "".join(f"   {name}\n" for name in names)
    return f"\n.. toctree::\n{hidden}   :maxdepth: {depth}\n\n{entries}"


def stand_in_for_integrations() -> None:
    """Integrations import libraries that need not be here, so their public functions are read from their source."""
    for path in INTEGRATIONS:
        name = f"torchops.integrations.{path.stem}"
        public = {node.name for node in public_of("", [path]).values()}
        tree = ast.parse(path.read_text())
        module = sys.modules[name] = ModuleType(name, ast.get_docstring(tree))
        module.__file__ = str(path)
        tree.body = [
            *ast.parse("from __future__ import annotations").body,
            *(node for node in tree.body if isinstance(getattr(node, "value", None), ast.Constant)),  # defaults
            *(without_body(node) for node in tree.body if getattr(node, "name", None) in public),
        ]
        exec(compile(tree, path, "exec"), vars(module))
        setattr(torchops.integrations, path.stem, module)


def without_body(node: ast.FunctionDef | ast.ClassDef) -> ast.FunctionDef | ast.ClassDef:
    """Nothing but signature, docstring and methods."""
    node.decorator_list = [one for one in node.decorator_list if ast.unparse(one) in ("classmethod", "property")]
    if isinstance(node, ast.ClassDef):
        methods = [without_body(one) for one in node.body if isinstance(one, ast.FunctionDef)]
        node.bases, node.body = [], [node.body[0], *methods]
    else:
        node.body = node.body[:1] if ast.get_docstring(node) else [ast.copy_location(ast.Pass(), node)]
    return node


def adapt_links(public: Sequence[str]) -> Callable:
    """In a page of Markdown `merge_tokens` and `torchops.merge_tokens` become links to the function's page. A link to a
    folder of the repository becomes text, since the site has pages and files only."""
    short = [name.rpartition(".")[2] for name in public]
    targets = {name: full for name, full in zip(short, public, strict=True) if short.count(name) == 1}
    targets |= {name: name for name in public}

    def adapt(app, doctree: nodes.document) -> None:  # noqa: ANN001
        if not doctree["source"].endswith(".md"):
            return
        folder = (ROOT / app.env.docname).parent
        for link in list(doctree.findall(pending_xref)):
            if link["reftype"] == "myst" and (folder / link["reftarget"]).is_dir():
                link.replace_self(link.children)
        for node in list(doctree.findall(nodes.literal)):
            target = targets.get(node.astext())
            if target and not isinstance(node.parent, (nodes.reference, pending_xref)):
                node.replace_self(pending_xref("", node.deepcopy(), refdomain="py", reftype="obj", reftarget=target))

    return adapt
