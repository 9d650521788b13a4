"""Packaging of the distribution `rock-model-service`: two modules, no dependencies."""

import os
import re

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


setup(
    name="rock-model-service",
    version=re.search(r'^__version__ = "(.+)"$', read("rock_ms.py"), re.MULTILINE).group(1),
    description="The ROCK model service and its SDK: an agent's LLM calls, answered by a trainer or a model's server.",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.7",
    py_modules=["rock_ms", "rock_sdk"],
    entry_points={
        "console_scripts": ["rock = rock_ms:main", "rock-ms = rock_ms:main", "rock-agent-servers = rock_sdk:main"]
    },
    classifiers=[
        "Environment :: Console",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
    ],
)
