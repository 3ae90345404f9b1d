import os

# Before torch is loaded: threads of OpenMP that wait for others sleep, instead of spinning. It costs nothing
# on an idle machine, and on one that has other work to do, training takes half the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
