import sys, json, pathlib
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.kernels import archive, machine
import pmcore
cache = pathlib.Path("/tmp/km/cache"); cache.mkdir(exist_ok=True)
which, *cmd = sys.argv[1:]
tree = archive.fetch(next(c for c in archive.choices() if c.name == which), cache)
cmds=[c.split() for c in " ".join(cmd).split(" + ")]
pk = pathlib.Path("/tmp/km/pk-%s" % which); 
import shutil; shutil.rmtree(pk, ignore_errors=True)
top = pathlib.Path(__file__).parents[2]
shutil.copytree(top/"pmcore", pk); shutil.copytree(top/"backends", pk/"backends"); shutil.copytree(top/"spec", pk/"spec")
def ev(e):
    if e["event"]=="line": print(e["text"], flush=True)
    else: print(json.dumps(e), flush=True)
told = machine.boot(tree, cmds, cache=cache, package=pk, limit=float(__import__("os").environ.get("LIMIT","1500")), listen=ev, files=[pathlib.Path(f) for f in __import__("os").environ.get("FILES","").split() ])
if not told.done: print(told.console)
