"""A machine in software: wiped, installed, rebooted and trained on by the project's own commands.

The guest's hardware is QEMU, its firmware OVMF, its live medium and its package repository are cut
from one Debian root file system dressed as Arch. What provision sends over SSH is the real thing.

  tools.py       programs that the host needs, and their installation
  cache.py       stages: made once for given inputs, complete or absent
  rootfs.py      Debian packages, dressed as Arch
  packages.py    that root split into pacman packages, and the stand-ins; a repository
  signing.py     the key of that repository, and the keyring package
  medium.py      the live medium
  wheels.py      a flat folder of Python wheels
  server.py      repository and wheels over HTTP on loopback
  qemu.py        the command line of a virtual machine                      pure
  vm.py          a running virtual machine
  bed.py         all of the above, built in order; machines made from it
  iso.py         the official ISO: whether a file is one, and whether Arch signed it
  official.py    what takes the bed's place where that ISO is booted
  loop.py        the phases of a rehearsal
  __main__.py    python -m provision.rehearsal run|bed|ssh
"""
