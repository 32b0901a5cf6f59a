"""How many evaluations a search needs: strategies on problems whose optimum is known."""
from __future__ import annotations
import sys, time, statistics
import numpy as np
from search_worlds import World
from sparsevit_cli.search import search_sparsity

def curve(world, strategy, seed, most, **settings):
    """regret after each evaluation"""
    t=time.perf_counter()
    r=search_sparsity(world.space, world.evaluate, world.cost, world.budget, strategy=strategy, seed=seed, max_evaluations=most, **settings)
    best=-np.inf; out=[]
    for e in r.history:
        if e.metric>best: best=e.metric; reg=world.optimum-world.true_metric(e.config)
        out.append(reg)
    return out, time.perf_counter()-t

if __name__ == "__main__":
    seeds=range(int(sys.argv[1]),int(sys.argv[2]))
    what=sys.argv[3].split(",")
    depths=tuple(map(int,sys.argv[4].split("-"))) if len(sys.argv)>4 else (2,2,6,2)
    marks=[20,30,40,60,100,300,1000]
    rows={}
    for s in seeds:
        w=World(s,depths)
        for name in what:
            most={"surrogate":100}.get(name,300)
            out,t=curve(w,name,s,most)
            rows.setdefault(name,[]).append(out)
            print(s,name,f"opt {w.optimum:.2f} n={len(out)} {t:.1f}s"," ".join(f"{m}:{out[min(m,len(out))-1]:.3f}" for m in marks if m<=most), "first<.1:",next((i+1 for i,v in enumerate(out) if v<=.1),None),flush=True)
    for name,o in rows.items():
        print(name," ".join(f"{m}: {statistics.median(x[min(m,len(x))-1] for x in o):.3f}/{max(x[min(m,len(x))-1] for x in o):.3f}" for m in marks), "evals",statistics.median(map(len,o)))
