#!/usr/bin/python3
"""A wire between a node and Redis that can be cut.

    link.py SOCKET TARGET

forwards connections to the unix socket SOCKET to the unix socket TARGET and
obeys lines on its standard input, answering each with one:

    up          as a wire should
    cut         all connections break, new ones are closed at once
    hang        nothing gets through, and nobody is told
    slow SECS   each piece of data takes so long

It ends when its input does. Link is its remote control.
"""

import asyncio
import os
import subprocess
import sys


class Link:
    """A link.py of one's own, for a node."""

    def __init__(self, path, target):
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), path, target],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.command("up")

    def command(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer != "ok":
            raise RuntimeError("link %s: %s: %r" % (self.path, line, answer))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Wire:
    def __init__(self, target):
        self.target = target
        self.writers = set()
        self.is_cut = False
        self.delay = 0
        self.passing = asyncio.Event()

    async def pump(self, reader, writer):
        while data := await reader.read(65536):
            await asyncio.sleep(self.delay)
            await self.passing.wait()
            writer.write(data)
            await writer.drain()

    async def connected(self, reader, writer):
        ends = [writer]
        self.writers.add(writer)
        try:
            if self.is_cut:
                return
            far_reader, far_writer = await asyncio.open_unix_connection(
                self.target)
            ends.append(far_writer)
            self.writers.add(far_writer)
            pumps = [asyncio.ensure_future(self.pump(*way)) for way in (
                (reader, far_writer), (far_reader, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            # Redis is away
            pass
        finally:
            for end in ends:
                self.writers.discard(end)
                end.close()

    def obey(self, line):
        word, *args = line.split()
        self.is_cut = word == "cut"
        self.delay = float(args[0]) if word == "slow" else 0
        if self.is_cut:
            for writer in self.writers:
                writer.transport.abort()
        if word == "hang":
            self.passing.clear()
        else:
            self.passing.set()


async def main(path, target):
    wire = Wire(target)
    server = await asyncio.start_unix_server(wire.connected, path)
    # services of other users come here
    os.chmod(path, 0o777)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        wire.obey(line.decode())
        print("ok", flush=True)
    server.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
