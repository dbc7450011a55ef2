#!/usr/bin/python3
"""make-seeds.py DIR

Writes the inputs that the fuzz targets begin with: DIR/TARGET/NAME, made of
test/vectors and of what is written out here, and copies of those in
test/fuzz/seeds/TARGET. What a target's input looks like is told at the top of its
fuzz-TARGET.c.
"""

import hashlib
import pathlib
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent
VECTORS = HERE.parent / "vectors"


def unhex(text):
    """BYTES of the vectors: HEX, or HEX*COUNT, in pieces."""
    data = b""
    for piece in text.split():
        piece, _, count = piece.partition("*")
        data += bytes.fromhex(piece) * int(count or 1)
    return data


def vectors(name, *kinds):
    """What stands behind WHAT [WORD=VALUE ...] in lines of these kinds."""
    for line in (VECTORS / f"{name}.txt").read_text().splitlines():
        words = line.split()
        if words and words[0] in kinds:
            data = unhex(" ".join(w for w in words[1:] if "=" not in w))
            # the fuzzer goes for what is small
            if len(data) <= 4096:
                yield data


def u16(num):
    return num.to_bytes(2, "big")


def u64(num):
    return (num % 2 ** 64).to_bytes(8, "big")


def block(data):
    return u16(len(data)) + data


def num(value):
    """As dovetail-wire.h has it."""
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def string(text):
    return num(len(text)) + text.encode()


CHANGES = list(vectors("changes", "change"))
ACKS = list(vectors("acks", "ack"))


def change():
    yield from CHANGES
    yield from vectors("changes-refused", "change")


def entry():
    for data in [*vectors("entries", "open", "own"),
                 *vectors("entries-refused", "open", "own")]:
        yield b"\0" + data
    fixed = b"\1" + u64(1) + u64(2) + u64(3) + block(b"payload")
    for kind in range(4):
        for what in range(6):
            yield (fixed + bytes([kind << 5, kind & 1]) +
                   bytes([what]) + u16(what * 40) + b"\1.")
    for data in CHANGES:
        yield b"\2\0" + num(len(data)) + data
    yield b"\2\0" + b"".join(num(len(data)) + data for data in CHANGES[:8])
    for data in [*ACKS, *vectors("acks", "refused")]:
        yield b"\2\1" + data


# answers in Redis' protocol
def bulk(data):
    data = data.encode() if isinstance(data, str) else data
    return b"$%d\r\n%b\r\n" % (len(data), data)


def array(*items):
    return b"*%d\r\n%b" % (len(items), b"".join(items))


NIL = b"$-1\r\n"


def redis():
    entries = array(array(bulk("1-1"), array(bulk("e"), bulk("DVTL"))))
    answers = [b"+OK\r\n", b":12\r\n", b"-ERR no\r\n", NIL, b"*-1\r\n",
               array(array(bulk("log:a:0"), entries)), bulk("x" * 300)]
    for flags in range(16):
        hello = b"+OK\r\n" * bin(flags & 6 or flags & 1).count("1")
        yield bytes([flags, 7]) + block(hello + b"+PONG\r\n") + \
            block(b"".join(answers))
        yield bytes([flags, 7]) + block(hello + b"-NOPERM\r\n") + \
            b"".join(block(a[:3]) + block(a[3:]) for a in answers) + block(b"")
    yield bytes([0, 3]) + block(b"-NOAUTH Authentication required\r\n")
    yield bytes([0, 3]) + block(b"+PONG\r\n*1048577\r\n") + block(b"")
    yield bytes([0, 3]) + block(b"+PONG\r\n") + \
        block(b"*600000\r\n*600000\r\n*2147483647\r\n:1\r\n")
    yield bytes([0, 3]) + block(b"+PONG\r\n$536870912\r\nabc")
    yield bytes([0, 3]) + block(b"+PONG\r\n%1\r\n:1\r\n~1\r\n,1.5\r\n")


def url():
    for text in ["redis://localhost", "redis://user@redis.example.com:6380/3",
                 "rediss://[::1]:6379/15?prefix=mail:", "unix:/run/redis.sock",
                 "unix:/run/r?user=u&db=2&prefix=p", "redis://u:p@host",
                 "redis://10.0.0.1?prefix=a&prefix=b", "redis://::1",
                 "redis://h:0", "redis://h:65536", "redis://h/4294967296",
                 "unix:relative", "redis://h?password=x", "http://h",
                 "redis://a@b@c", "redis://h/1/2", "redis://[::1", ""]:
        yield text.encode()


def state():
    chain = bytes(range(104))
    log = b"DVTLLOG2" + chain
    log += hashlib.blake2b(log, digest_size=16).digest()
    yield b"\0" + log
    yield b"\0" + log[:-1]
    yield b"\0" + log + b"more"
    yield b"\1" + chain + u16(9) + b"\1"
    yield b"\1" + chain + u16(127) + b"\0"
    long = "x" * 201
    hashed = "%-" + hashlib.blake2b(long.encode(), digest_size=16).hexdigest()
    yield b"\2" + b"".join(
        block(name.encode()) + block(content.encode()) for name, content in
        [("jane", ""), ("a%20b", ""), ("%2Ehidden", ""), (hashed, long),
         (hashed[:-1] + "x", long), ("%4", ""), ("%00", ""), ("%41", "")])
    yield b"\3" + b"".join(
        block(user.encode()) for user in
        ["jane@example.com", ".hidden", "a b", "%-x", long, "\u00fc/../",
         "%" * 100])
    for size in (0, 12, 31, 32, 40):
        yield b"\4" + bytes([size]) + bytes(range(size)) + \
            b"".join(u64(2 ** 32 - n) for n in range(3))


def keyring():
    good = [b"\1\n", b"\2\n\5\n", b"\3\n", b"\4\n"]
    yield b"".join(block(f) for f in good)
    for i, other in enumerate([b"\1\n\1\n", b"# old\n\5\n\n\2", b"\2\n",
                               b"\3\n\4\n"]):
        yield b"".join(block(other if i == j else f)
                       for j, f in enumerate(good))
    for bad in [b"", b"\3", b"dovetail-secret-1 a ", b"dovetail-public-1 b ",
                b"dovetail-public-1 b " + b"A" * 43 + b"=\n", b"x" * 1100,
                b"dovetail-public-1 ", b"\0" * 40]:
        for i in range(4):
            yield b"".join(block(bad if i == j else f)
                           for j, f in enumerate(good))


def frame(type_, *payload):
    payload = b"".join(payload)
    return (len(payload) + 1).to_bytes(4, "big") + bytes([type_]) + payload


def answer():
    welcome = frame(65, num(1), string("a"))

    def reply(tag, how=0, text=""):
        return frame(66, num(tag), bytes([how]), string(text))

    def position(tag, seq=3, offset=4000):
        return frame(67, num(tag), num(seq), num(offset))

    def do(what, arg=0, sent=b""):
        return bytes([what, arg]) + block(sent)

    mark, clean, sweep, send, wait, cancel, ask, check, end = range(1, 10)
    yield do(mark) + do(send, 0, welcome) + do(wait, 0, reply(1)) + do(clean)
    yield do(send, 5) + do(send, 5) + do(wait, 1, reply(2) + reply(1, 1, "no"))
    yield do(mark) + do(ask, 0, welcome + position(1)) + \
        do(ask, 0, position(2, 0, 0)) + do(check, 2, reply(3)) + \
        do(check, 1, reply(4, 1, "Redis is not available"))
    yield do(check, 1, welcome + reply(1, 1, "TLS failed: " + "x" * 100))
    yield do(mark) + do(ask, 0, reply(1)) + do(check, 1, position(2))
    yield do(send) + do(wait) + do(wait, 0, reply(1)[:7]) + \
        do(wait, 0, reply(1)[7:])
    yield do(send) + do(wait, 0, b"\0\0\0\0") + do(send) + do(end, 0) + do(wait)
    yield do(send) + do(cancel) + do(wait, 0, reply(1)) + do(end, 1) + do(mark)
    yield do(sweep, 1) + do(send, 2) + do(wait, 2, reply(1, 9, "x" * 300))
    yield do(send, 1) + do(send, 2) + do(0, 0, reply(1) * 2) + do(wait, 2) + \
        do(wait, 1, frame(68, num(2), num(0)) + frame(69, string("u")))


def queue():
    def do(what, whom=0, *more):
        return bytes([what, whom]) + b"".join(more)

    def sent(type_, *payload, whom=0):
        return do(2, whom, bytes([type_]), block(b"".join(payload)))

    def change_frame(tag, data, level=1, whom=0):
        return sent(5, num(tag), bytes([level]), data, whom=whom)

    hello = sent(1, num(1), num(4711), b"\0")
    worker = sent(1, num(1), num(4712), b"\1", num(0), num(1), whom=2)
    begin = do(0) + do(4) + do(7, 0, b"\xff") + do(4, 1) + do(7, 1, b"\1")
    all_answers = do(7, 0, b"\xff") + do(7, 1, b"\1")
    report = sent(9, num(2), *[
        num(6) + b"".join(string(k) + string(v) for k, v in
                          [("peer", peer), ("shard", "0"), ("lag", "12.345"),
                           ("rejected_reasons", "gap=2 version=1 gap=3"),
                           ("applied_time", "1700000000"), ("error", "no")])
        for peer in "bc"], whom=2)
    status = sent(8, num(99))

    for data in CHANGES:
        yield begin + hello + change_frame(1, data) + all_answers + status
    pair = [c for c in CHANGES if len(c) > 60][:2]
    for level in range(4):
        yield begin + hello + b"".join(
            change_frame(n, data, level) for n, data in enumerate(pair * 3)) + \
            all_answers + do(7, 0, b"\3") + do(10, 0, b"\1") * 6
    yield begin + hello + sent(2, string("jane")) + change_frame(1, pair[0]) + \
        do(5) + do(10, 0, b"\5") + do(4) + all_answers + do(3)
    yield begin + do(0, 2) + worker + hello + sent(4, string("jane")) + \
        do(10, 0, b"\2") + sent(10, string("jane"), b"\1", whom=2) + report + \
        status + sent(2, string("joe")) + do(3) + do(10, 0, b"\5") + \
        do(3, 2) + status
    admin = sent(1, num(1), num(4713), b"\2")
    numbers = b"\0" + bytes(range(10))
    done = sent(14, num(1), numbers, whom=2) + \
        sent(13, num(1), numbers, whom=2) + \
        sent(14, num(1), b"\0", string(""), whom=2)
    result = sent(12, num(1), string("jane"), string("INBOX"), string("b"),
                  b"\2", num(7), num(1), string("UID 3: flags"), whom=2)
    for users in ["jane", "*"]:
        job = sent(11, num(1), b"\4", string(users), num(0), b"\0")
        yield begin + do(0, 2) + worker + admin + job + result + done
        yield begin + do(0, 2) + worker + admin + job + result + do(3, 2)
        yield begin + do(0, 2) + worker + admin + job * 2 + result + do(3) + \
            result + done
        yield begin + admin + job + sent(2, string("jane"), num(3))
    yield do(0, 1) + do(2, 1, b"\1", block(num(1) + num(1) + b"\0")) + \
        sent(2, string("stranger")) + sent(2, string("jane")) + \
        sent(3, string("stranger")) + do(4) + all_answers + \
        change_frame(1, pair[0])
    yield begin + hello + sent(6, num(1), string("jane"), bytes(16), num(1)) + \
        sent(7, num(2), b"\0") + sent(7, num(3), b"\2") + status
    raw = frame(1, num(1), num(1), b"\0") + frame(8, num(1))
    yield begin + do(1, 0, block(raw[:9])) + do(1, 0, block(raw[9:]))
    yield begin + do(1, 0, block(b"GET / HTTP/1.0\r\n\r\n"))
    applied = [data for data in ACKS if len(data) < 200]
    for data in applied:
        yield begin + hello + change_frame(1, pair[0], 2) + all_answers + \
            do(8, 0, b"\0", u64(1700000000 * 10 ** 6), block(data)) + status + \
            do(10, 0, b"\1")
    for text in [b"-WRONGTYPE no\r\n", b"-ERR no\r\n", b"*0\r\n", NIL, b":7\r\n",
                 array(array(bulk("5-6"), array(bulk("e"), bulk("x")))),
                 array(array(bulk(str(2 ** 62) + "-0"), array())),
                 array(bulk("last-generated-id"), bulk("9-9"))]:
        yield do(0) + hello + do(4) + do(6, 0, block(text) ) * 6 + \
            do(7, 0, b"\xff") + change_frame(1, pair[0]) + \
            do(6, 0, block(text)) + do(10, 0, b"\1") + do(7, 0, b"\xff") + \
            do(4, 1) + do(6, 1, block(text)) * 2 + do(7, 1, b"\1") + \
            do(6, 1, block(array(array(bulk("ack:a"), text)))) + status
    for shard in range(3):
        yield do(4) + do(9, 0, bytes([shard]), u64(3), u64(4)) * 2 + \
            do(7, 0, b"\xff") + do(10, 0, b"\x40")
    for text in ["equal or smaller", "last possible ID", "OOM"]:
        yield begin + hello + change_frame(1, pair[0]) + \
            do(6, 0, block(b"-ERR %b\r\n" % text.encode())) + all_answers + \
            change_frame(2, pair[0]) + all_answers


def health():
    def say(whom, data, how=0):
        if isinstance(data, str):
            data = data.encode()
        return bytes([whom, how]) + block(data)

    def counts(*values):
        return b"".join(map(num, values or (0, 0, 0, 0)))

    def peer(name, lag=0, entries=0, diverged=0, redis="", stuck="", age=1):
        return b"".join([
            string(name), b"\1", num(age), *map(num, (lag, entries, 9, 7, 0)),
            counts(0, 0, 0, diverged), num(age), num(0), num(age),
            *map(num, (lag, entries, 7, 0)), counts(), string(redis),
            string(stuck)])

    def trouble(user, kind=5, mailbox="INBOX", text="1 message on a"):
        return b"".join([string("s3cr3t" + user), string(mailbox), string("a"),
                         string("b"), bytes([kind]), num(5000), string(text)])

    # sent in the future: as new as can be
    def report(*peers, troubles=(), fenced="", unprotected="", redis="",
               known=1):
        return frame(
            16, num(2 ** 50), bytes([known]), string("a"), b"\1\0",
            string(fenced), string(unprotected), string(redis),
            *map(num, (3, 4096, len(troubles), 0, 1000, 0, 1700000000)),
            num(len(peers)), *peers, num(0), num(len(troubles)), *troubles)

    def policy(recipient):
        return "request=smtpd_access_policy\nprotocol_state=RCPT\n" \
            "recipient=%s\n\n" % recipient

    def get(user):
        return frame(17, num(1), string(user))

    well = say(0, report(peer("b"), peer("c")))
    bad = say(0, report(peer("b", 70000, 5, 2), peer("c", redis="away"),
                        troubles=[trouble("x"), trouble("y@z", 1, "")],
                        unprotected='Redis is "away"\\\n'))
    paths = ["/", "/health", "/history", "/healthz", "/readyz", "/primary",
             "/replica", "/replica?lag=5", "/replica?lag=0.5",
             "/replica?x=1&lag=500ms", "/replica?lag=1h", "/metrics", "/%00?"]
    for first in well, bad, say(0, report(known=0)), \
            say(0, report(fenced="by hand")), \
            say(0, report(peer("b", stuck="no key", age=0))):
        yield first + b"".join(say(4, path, i) for i, path in
                               enumerate(paths[:6]))
        yield first + b"".join(say(4, path, i) for i, path in
                               enumerate(paths[6:]))
        yield first + say(1, policy("s3cr3tx@example.org") * 2, 7) + \
            say(2, "S3CR3TY+ext@z\r\n", 3) + say(2, "") + say(3, "", 0)
        yield first + say(0, frame(1, num(1), num(1), b"\2") + get("*"), 5) + \
            say(0, get("s3cr3tx")) + say(0, get(""))
    keys = ["dovetail user%d@example.net" % i for i in range(9)]
    asked = "".join("%d:%s," % (len(key), key) for key in keys)
    yield well + say(6, asked, 1) + say(6, "0:,") + say(6, "4:a b ,")
    yield bad + say(6, asked + "99999999999:") + say(6, "3:a b;") + \
        say(6, "12:dovetail x@y,") + say(6, "7:a s3cr3tx,", 2)
    yield bad + well + say(3, "agent\n") + say(1, "=\n\n") + \
        say(2, "a\0b") + say(1, policy("x").replace("\n", "\r\n"), 1)
    yield say(5, "POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
              "\r\nabc") + say(5, "GET /health HTTP/1.0\r\n\r\n", 1) + \
        say(5, "HEAD / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 1) + \
        say(5, "\x16\3\1\2\0\1\0")


def replay():
    def do(what, whom=0, *more):
        return bytes([what, whom]) + b"".join(more)

    def sealed(seq, *changes, bits=4, generation=1700000000, time=1700000000):
        return do(4, 0, bytes([bits]), u64(1), u64(generation), u64(seq),
                  u64(time * 10 ** 6), block(b"".join(changes)))

    none = block(b"") * 2
    chain = (1).to_bytes(8, "little") + (1700000000).to_bytes(8, "little") + \
        (3).to_bytes(8, "little") + bytes(32)
    state = chain + hashlib.blake2b(chain, digest_size=16).digest()
    guid = "0123456789abcdef" * 2
    wanted = f"jane\tb\t{guid}\tINBOX\njoe\tc\t{'0' * 32}\t\n" \
        f"\tb\t{'0' * 32}\t2\n"
    begin = do(0) + do(0, 1)
    groups = [num(len(data)) + data for data in CHANGES]
    for group in groups:
        yield none + begin + sealed(1, group) + do(7, 0, b"\2") + do(9) + \
            do(3, 1, b"\x1f")
    for at in range(0, len(groups), 5):
        yield none + begin + sealed(1, *groups[at:at + 5]) + \
            sealed(2, groups[0], bits=36) + do(7, 0, b"\x70") + do(9)
    yield block(state) + block(wanted.encode()) + begin + \
        sealed(4, bits=12) + sealed(5) + do(7, 0, b"\x80") * 3
    yield block(state[:-1]) + block(b"x\ty\n\n") + begin + sealed(1, bits=0)
    yield none + begin + sealed(1, groups[0]) + sealed(1, groups[0]) + \
        sealed(2, groups[0], bits=16) + sealed(3, b"\xff\xff", bits=64) + \
        sealed(9, groups[0], bits=8) + do(8, 1) + do(7, 0, b"\xff") + do(9)
    for line in [f"jane\tb\t{'0' * 32}\tINBOX\n", f"\tB b\t{'0' * 32}\t2\n",
                 f"jane\tb\t{guid}\tINB"]:
        yield block(b"") + block(line.encode()) + do(7, 0, b"\xff") * 2
    yield none + begin + sealed(1, time=2 ** 40) + sealed(2, time=0) + do(1) + \
        do(0) + do(7, 0, b"\xff")
    for text in [b"-WRONGTYPE no\r\n", b"-ERR no\r\n", b"*0\r\n", NIL, b":7\r\n",
                 array(array(bulk("log:b:1"), array(
                     array(bulk("5-6"), array(bulk("e"), bulk("x")))))),
                 array(array(bulk("log:c:3"), array(
                     array(bulk("5-6"), array(bulk("f"), bulk("x"))),
                     array(bulk("6"), array(bulk("a")))))),
                 array(bulk("last-generated-id"), bulk("9-9")),
                 b"+list\r\n", b"+stream\r\n"]:
        yield none + begin + do(2, 0, block(text)) + do(7, 0, b"\x18") + \
            do(2, 1, block(text)) * 12 + do(9) + do(2, 1, block(text)) * 12 + \
            do(7, 0, b"\xff") + do(3, 1, b"\x1f")
    work = frame(69, string("jane"))
    yield none + do(6, 0, bytes([70]), block(num(1) + b"\4" + string("*") +
                                             num(0) + b"\1")) + \
        do(6, 0, bytes([72]), block(b"\1\1")) + \
        do(6, 0, bytes([71]), block(b"\1\0")) + \
        do(6, 0, bytes([68]), block(b"\0\0"))
    yield none + do(6, 0, b"\x45", block(string("jane"))) + \
        do(5, 0, block(work[:6])) + do(5, 0, block(work[6:] + work)) + \
        do(7, 0, b"\x20") * 2 + do(5, 0, block(b"\0\0\0\0"))


TARGETS = [answer, change, entry, health, keyring, queue, redis, replay, state, url]


def main():
    out = pathlib.Path(sys.argv[1])
    for target in TARGETS:
        name = target.__name__
        (out / name).mkdir(parents=True)
        for data in target():
            digest = hashlib.sha256(data).hexdigest()[:16]
            (out / name / digest).write_bytes(data)
        for path in (HERE / "seeds" / name).glob("*"):
            shutil.copy(path, out / name)


if __name__ == "__main__":
    main()
