"""The first import of this module begins the rehearsal, on a machine of eight GPUs."""

from tests.cuda.rehearsal import start

start(count=8)
