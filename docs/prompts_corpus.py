"""Writes the real speech of docs/results.md, on Debian with ffmpeg: `python docs/prompts_corpus.py speech es fr en`.

Telephone prompts of the Asterisk project (CC-BY-SA 3.0) from the distribution's packages, one speaker a language, 16
kHz mono: SPEECH/LANGUAGE/{train,validation,test}.jsonl as docs/data.md has them, the English prompt as translation.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import soundfile

PACKAGE = "asterisk-core-sounds-{}"
SECONDS = (0.2, 28.0)


def transcripts(root: Path, language: str) -> dict[str, str]:
    """Prompt to text, without prompts of tones alone and texts whose accents the package lost ("pu? essere")."""
    path = root / "usr/share/doc" / PACKAGE.format(language) / f"core-sounds-{language}.txt.gz"
    texts = {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines():
        name, colon, text = line.partition(":")
        text = " ".join(re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", text).split())
        if colon and not line.startswith(";") and re.search(r"\w", text) and not re.search(r"\w\?.*\w", text):
            texts[name.strip()] = text
    return texts


def split_of(name: str) -> str:
    """By the prompt's name, so that no language is trained on what another is tested on."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "test" if bucket < 25 else "validation" if bucket < 37 else "train"


def write(root: Path, language: str, english: dict[str, str], out: Path) -> dict[str, list[float]]:
    """Decodes one language's prompts; the seconds of each split's utterances."""
    texts = transcripts(root, language)
    (sounds,) = (root / "usr/share/asterisk/sounds").glob(f"{language}_*")
    (out / "audio").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for path in sorted(sounds.rglob("*.g722")):
        name = path.relative_to(sounds).with_suffix("").as_posix()
        if name not in texts:
            continue
        wav = out / "audio" / (name.replace("/", "__") + ".wav")
        command = ["ffmpeg", "-y", "-v", "error", "-i", str(path), "-ar", "16000", "-ac", "1", str(wav)]
        subprocess.run(command, check=True)
        seconds = soundfile.info(wav).duration
        if SECONDS[0] <= seconds <= SECONDS[1]:
            row = {"id": name, "audio": f"audio/{wav.name}", "text": texts[name], "translation": english.get(name)}
            rows[split_of(name)].append({**row, "seconds": round(seconds, 2)})
    for split, some in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (out / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    return {split: [row["seconds"] for row in some] for split, some in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("languages", nargs="+", choices=["en", "es", "fr", "it", "ru"])
    args = parser.parse_args()
    if missing := [tool for tool in ("apt-get", "dpkg", "ffmpeg") if shutil.which(tool) is None]:
        parser.error(f"{', '.join(missing)} not found: run this on Debian or Ubuntu, after `apt-get install ffmpeg`")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = {PACKAGE.format("en")}
        names |= {PACKAGE.format(language) + part for language in args.languages for part in ("", "-g722")}
        subprocess.run(["apt-get", "download", "-q", *sorted(names)], cwd=root, check=True)
        for package in root.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
        english = transcripts(root, "en")
        for language in args.languages:
            sizes = write(root, language, english, args.out / language)
            parts = (f"{split} {len(each)} ({sum(each) / 60:.1f} min)" for split, each in sizes.items())
            print(f"{language}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
