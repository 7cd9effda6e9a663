"""Kills savers at random system calls, a reader beside: no save may be lost or mixed, and the next one leaves nothing
behind.

    python tests/campaigns/kill_saves.py --kills 1000

Each save has a stamp, which is in its config.json and is the value of all its weights. After each kill the folder must
hold the save before or the one that was killed, whole. Prints one JSON line: how many saves were killed, loads beside
them, and what went wrong.
"""

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
CONFIG = dict(
    vocab_size=7,
    hidden_size=4,
    intermediate_size=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    layer_types=["attn", "swa"],
    efficient_attention_config={"swa": {"window_size": 2}},
)


def build(folder: str) -> str:
    """The library that kills."""
    library = os.path.join(folder, "kill_at.so")
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", library, str(HERE / "kill_at.cpp"), "-ldl"], check=True)
    return library


class Scenario:
    """What is saved to `path` again and again, and how it is read. A stamp is a number."""

    def __init__(self, name: str, where: Path):
        self.name, self.path = name, where / "m"

    def prepare(self) -> None:
        if self.name != "file":
            self.save(0)
            (self.path / "README.md").write_text("kept")
            (self.path / "more").mkdir()
            (self.path / "more" / "notes").write_text("kept")

    def save(self, stamp: int) -> None:
        from jetkernels import files
        from jetkernels.postnas.checkpoints import save_state

        if self.name == "file":
            save_state(self.path, "kill", {"of": "kills"}, {"stamp": stamp, "filler": "x" * (1000 + 10 * (stamp % 7))})
            return
        if self.name == "one by one":
            files._exchange = refuse
        model = stamped_model(stamp)
        # One file or many, so that an index comes and goes.
        model.save_pretrained(self.path, 10**9 if stamp % 2 else 300)

    def load(self) -> int:
        """The stamp; ValueError if the save is not whole."""
        from jetkernels.model import JetNemotronForCausalLM
        from jetkernels.postnas.checkpoints import load_state

        if self.name == "file":
            state = load_state(self.path, "kill", {"of": "kills"})
            return state["stamp"]
        model = JetNemotronForCausalLM.from_pretrained(self.path)
        values = {p.flatten()[0].item() for p in model.parameters()} | {
            p.flatten()[-1].item() for p in model.parameters()
        }
        if values != {float(model.config.extra["stamp"])}:
            raise ValueError(f"mixed: config of {model.config.extra['stamp']}, weights of {sorted(values)}")
        return model.config.extra["stamp"]

    def leftovers(self) -> list[str]:
        """What is there and should not be, or the other way round, after a save that nobody killed."""
        found = {str(path.relative_to(self.path.parent)) for path in self.path.parent.rglob("*")}
        need = {"m"}
        if self.name != "file":
            need |= {"m/config.json", "m/README.md", "m/more", "m/more/notes"}
            found = {name for name in found if not name.startswith("m/model")}
        return sorted(found ^ need)


def refuse(a, b) -> None:
    raise OSError(38, "no exchange here")


def stamped_model(stamp: int):
    import torch

    from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM

    model = JetNemotronForCausalLM(JetNemotronConfig(**CONFIG, extra={"stamp": stamp}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(stamp)
    return model


def in_child(work) -> tuple[int, str]:
    """(exit status, what `work` returned) of a forked process."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(out)
            text = work()
            os.set_inheritable(into, False)
            os.write(into, str(text).encode())
            code = 0
        except BaseException as error:
            os.write(into, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(into)
    with open(out, "rb") as file:
        text = file.read().decode()
    return os.waitpid(child, 0)[1], text


def read_until(scenario: Scenario, stop: Path) -> str:
    loads, wrong, parent = 0, [], os.getppid()
    while (not loads or not stop.exists()) and os.getppid() == parent and len(wrong) < 1000:
        try:
            scenario.load()
            loads += 1
        except Exception as error:
            wrong.append(f"reader: {type(error).__name__}: {error}")
    return json.dumps({"loads": loads, "wrong": wrong})


def beside(work, stop: Path):
    """`work` in a forked process; what it returns, once `stop` is called."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        os.nice(5)
        os.write(into, work().encode())
        os._exit(0)
    os.close(into)

    def end() -> str:
        stop.write_text("")
        with open(out, "rb") as file:
            text = file.read().decode()
        os.waitpid(child, 0)
        stop.unlink()
        return text

    return end


def campaign(scenario: Scenario, kills: int, stop: Path, generator: random.Random) -> dict:
    shim = ctypes.CDLL(os.environ["KILL_AT"])
    scenario.prepare()
    scenario.save(1)
    scenario.load()

    def counted() -> str:
        shim.kill_at_arm(ctypes.c_long(1 << 60))
        scenario.save(2)
        return shim.kill_at_calls()

    code, calls = in_child(counted)
    assert code == 0, calls
    end = beside(lambda: read_until(scenario, stop), stop)
    found = {"killed": 0, "survived": 0, "lost or mixed": [], "leftovers": [], "failed": [], "calls": int(calls)}
    stamp = current = 2
    while found["killed"] < kills:
        for _ in range(generator.randint(1, 3)):
            stamp += 1
            moment = generator.randrange(int(calls) + 20)

            def save() -> str:
                shim.kill_at_arm(ctypes.c_long(moment))
                scenario.save(stamp)
                return ""

            code, text = in_child(save)
            found["killed" if code == 9 else "survived"] += 1
            if code not in (0, 9):
                found["failed"].append(text)
            try:
                loaded = scenario.load()
                if loaded not in ((stamp,) if code == 0 else (current, stamp)):
                    found["lost or mixed"].append(f"stamp {loaded}, must be {current} or {stamp}; killed at {moment}")
                current = loaded
            except Exception as error:
                found["lost or mixed"].append(f"{type(error).__name__}: {error}; killed at {moment}")
        stamp += 1
        current = stamp
        scenario.save(stamp)
        found["leftovers"] += scenario.leftovers()
    read = json.loads(end())
    return found | {"loads beside": read["loads"], "lost or mixed": found["lost or mixed"] + read["wrong"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to save (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if "KILL_AT" not in os.environ:
            library = build(folder)
            environment = os.environ | {"LD_PRELOAD": library, "KILL_AT": library, "OMP_NUM_THREADS": "1"}
            return subprocess.run(
                [sys.executable, "-m", "tests.campaigns.kill_saves", *sys.argv[1:]], env=environment
            ).returncode
        import torch

        torch.set_num_threads(1)
        names, start, whole = ("exchange", "one by one", "file"), time.time(), {}
        for i, name in enumerate(names):
            where = Path(folder) / name
            where.mkdir()
            kills = arguments.kills * (i + 1) // len(names) - arguments.kills * i // len(names)
            whole[name] = campaign(
                Scenario(name, where), kills, Path(folder) / "stop", random.Random(arguments.seed + i)
            )
        wrong = sum(len(found[key]) for found in whole.values() for key in ("lost or mixed", "leftovers", "failed"))
        shown = {
            name: {k: v[:5] if isinstance(v, list) else v for k, v in found.items()} for name, found in whole.items()
        }
        print(json.dumps({"wrong": wrong, "seconds": round(time.time() - start), **shown}))
        return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
