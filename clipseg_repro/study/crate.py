"""The results as a research object: ro-crate-metadata.json, made from provenance.json by the standards RO-Crate 1.1 and
Process Run Crate 0.5 (www.researchobject.org)."""

import json
from pathlib import Path
from urllib.parse import quote

import yaml

from clipseg_repro.files import written_whole
from clipseg_repro.study.results import recorded
from clipseg_repro.study.scales import Scale, project_root

NAME = "ro-crate-metadata.json"
STANDARD, PROCESS = "https://w3id.org/ro/crate/1.1", "https://w3id.org/ro/wfrun/process/0.5"
FORMATS = {
    ".csv": "text/csv",
    ".png": "image/png",
    ".npz": "application/zip",  # of NumPy arrays
    ".mp4": "video/mp4",
    ".vtt": "text/vtt",
}
LICENCES = {"https://spdx.org/licenses/MIT": "MIT License"}
LICENCES["https://spdx.org/licenses/CC-BY-SA-4.0"] = "Creative Commons Attribution Share Alike 4.0 International"
CODE, PICTURES = LICENCES  # as CREDITS.md has them


def write_crate(scale: Scale):
    """Write the crate of a scale's results, if there are any, and a CITATION.cff in the project that names authors."""
    citation = project_root() / "CITATION.cff"
    entries = recorded(scale)
    if entries and citation.exists():
        notebooks = [path.stem for path in sorted((project_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
        kept = {path.name for path in (scale.results / "decoders").glob("*")}
        text = crate(entries, yaml.safe_load(citation.read_text(encoding="utf-8")), notebooks, kept)
        with written_whole(scale.results / NAME) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")


def crate(entries: dict[str, dict], citation: dict, notebooks: list[str], kept: set[str]) -> str:
    """The JSON-LD that describes the files of `entries` (as `results.recorded` gives them) and the decoders that they
    were measured from: the same text from the same entries, CITATION.cff's content, names of notebooks, and names of
    the decoders that are `kept`; the others are known by their checksums alone.

    Every file has a sha256, and an action that says which code made it, of what, when and where.
    """
    graph: dict[str, dict] = {}

    def add(id: str, type: str, **more) -> dict:
        graph.setdefault(id, {"@id": id, "@type": type} | {key: value for key, value in more.items() if value})
        return {"@id": id}

    def people(listed: list[dict]) -> dict | list[dict]:
        found = []
        for person in listed:
            name = person.get("name") or f"{person['given-names']} {person['family-names']}"
            found.append(add(f"#{quote(name)}", "Organization" if "name" in person else "Person", name=name))
        return found if len(found) > 1 else found[0]

    def file(path: str, sha256: str, **more) -> dict:
        licence = PICTURES if path.startswith(("figures/", "demo.")) else CODE
        format = FORMATS.get(Path(path).suffix, "application/octet-stream")
        more |= {"encodingFormat": format, "license": {"@id": licence}, "sha256": sha256}
        return add(quote(path, safe="/+"), "File", name=path, **more)

    add(NAME, "CreativeWork", conformsTo={"@id": STANDARD}, about={"@id": "./"})
    root = graph["./"] = {"@id": "./", "@type": "Dataset"}
    add(PROCESS, "CreativeWork", name="Process Run Crate", version="0.5")
    for url, name in LICENCES.items():
        add(url, "CreativeWork", name=name)
    authors, paper = people(citation["authors"]), citation["preferred-citation"]
    arxiv = paper["identifiers"][0]["value"].replace("arXiv:", "https://arxiv.org/abs/")
    own = [add(f"#notebooks/{name}", "SoftwareSourceCode", name=name) for name in notebooks]
    theirs = {"author": people(paper["authors"]), "datePublished": str(paper["year"])}
    cited = add(arxiv, "ScholarlyArticle", name=paper["title"], **theirs)
    actions = []
    for path, entry in entries.items():
        code, model = f"{entry['commit'] or 'unknown'}{', changed' if entry['dirty'] else ''}", entry["model"]
        versions = [f"{name} {entry[name]}" for name in ("python", "torch", "transformers")]
        platform = ", ".join([*versions, entry["machine"]])
        software = add(
            f"#{quote(code)}/{quote(platform)}",
            "SoftwareSourceCode",
            name=f"clipseg_repro at commit {code}",
            version=entry["version"],
            runtimePlatform=platform,
            license={"@id": CODE},
            author=authors,
            hasPart=own,
        )
        used = [
            add(
                f"#{quote(model['source'])}/{model['sha256']}",
                "CreativeWork",
                name=f"model {model['source']}",
                identifier=model["sha256"] and f"sha256:{model['sha256']}",
            )
        ]
        used += [
            add(f"#{each}", "CreativeWork", name=f"annotations {each[:8]}", identifier=f"sha256:{each}")
            for each in (entry["data"] or "").split()
        ]
        if "decoder" in entry:
            name, digest = f"{Path(path).stem}.safetensors", entry["decoder"]
            told = f"decoder of the run {entry['run']}, seed {entry['run_seed']}, in half precision"
            if name in kept:
                used.append(file(f"decoders/{name}", digest, description=told))
            else:
                used.append(add(f"#{digest}", "CreativeWork", name=told, identifier=f"sha256:{digest}"))
        made = file(path, entry["sha256"], description=entry.get("caption") or _told(path, entry))
        actions.append(
            add(
                f"#{made['@id']}",
                "CreateAction",
                name=f"Making {path}",
                description=f"{entry.get('command', 'clipseg-repro')}, scale {entry['scale']}, seed {entry['seed']}",
                instrument=software,
                object=used,
                result=made,
                agent=authors,
                endTime=entry["time"],
            )
        )
    root |= {
        "name": f"Results of {citation['title']}",
        "description": "Tables, figures, decoders and what these got on every sample; each says what made it.",
        "license": {"@id": CODE},
        "datePublished": max(entry["time"] for entry in entries.values())[:10],
        "author": authors,
        "publisher": authors,
        "citation": cited,
        "conformsTo": {"@id": PROCESS},
        "hasPart": [{"@id": id} for id, each in graph.items() if each["@type"] == "File"],
        "mentions": actions,
    }
    context = [f"{STANDARD}/context", {"sha256": "http://schema.org/sha256"}]
    return json.dumps({"@context": context, "@graph": list(graph.values())}, indent=1, ensure_ascii=False) + "\n"


def _told(path: str, entry: dict) -> str:
    if "run" in entry:
        return f"what the run {entry['run']}, seed {entry['run_seed']}, got on every sample (study/measured.py)"
    return "the samples that all runs were measured on" if path.startswith("measured/") else "a figure"
