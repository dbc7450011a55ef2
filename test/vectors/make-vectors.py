#!/usr/bin/env python3
# Copyright (c) 2026 dovetail authors, LGPL-2.1-or-later, see COPYING
"""Make the test vectors: ./make-vectors.py [DIRECTORY]

A second implementation of dovetail-wire.h, dovetail-digest.h and
dovetail-seal.h, written from the headers alone and without libsodium, so that
it cannot share a mistake with the first. Ed25519 and X25519 come from Python's
cryptography (OpenSSL), BLAKE2b from hashlib; the rest is below. Everything
random is made from fixed labels, so the files come out the same each time.

The format of the files is told at the top of each of them; the reader is
test/unit/test-dovetail-vectors.c.
"""

import base64
import hashlib
import os
import struct
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey, X25519PublicKey)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

# ---- ChaCha20, Salsa20, Poly1305 and what libsodium builds from them ----

M32 = 0xffffffff


def rotl(x, n):
    return ((x << n) | (x >> (32 - n))) & M32


def chacha_quarter(s, a, b, c, d):
    s[a] = (s[a] + s[b]) & M32
    s[d] = rotl(s[d] ^ s[a], 16)
    s[c] = (s[c] + s[d]) & M32
    s[b] = rotl(s[b] ^ s[c], 12)
    s[a] = (s[a] + s[b]) & M32
    s[d] = rotl(s[d] ^ s[a], 8)
    s[c] = (s[c] + s[d]) & M32
    s[b] = rotl(s[b] ^ s[c], 7)


def salsa_quarter(s, a, b, c, d):
    s[b] ^= rotl((s[a] + s[d]) & M32, 7)
    s[c] ^= rotl((s[b] + s[a]) & M32, 9)
    s[d] ^= rotl((s[c] + s[b]) & M32, 13)
    s[a] ^= rotl((s[d] + s[c]) & M32, 18)


SIGMA = struct.unpack("<4I", b"expand 32-byte k")


def chacha_rounds(state):
    s = list(state)
    for _ in range(10):
        for i in range(4):
            chacha_quarter(s, i, i + 4, i + 8, i + 12)
        for i in range(4):
            chacha_quarter(s, i, (i + 1) % 4 + 4, (i + 2) % 4 + 8,
                           (i + 3) % 4 + 12)
    return s


def salsa_rounds(state):
    s = list(state)
    for _ in range(10):
        for a, b, c, d in ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6),
                           (15, 3, 7, 11), (0, 1, 2, 3), (5, 6, 7, 4),
                           (10, 11, 8, 9), (15, 12, 13, 14)):
            salsa_quarter(s, a, b, c, d)
    return s


def salsa_state(key, inp16):
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", inp16)
    return (SIGMA[0], *k[:4], SIGMA[1], *n, SIGMA[2], *k[4:], SIGMA[3])


def hchacha20(key, inp16):
    s = chacha_rounds(SIGMA + struct.unpack("<8I", key) +
                      struct.unpack("<4I", inp16))
    return struct.pack("<8I", *s[:4], *s[12:])


def hsalsa20(key, inp16):
    s = salsa_rounds(salsa_state(key, inp16))
    return struct.pack("<8I", s[0], s[5], s[10], s[15], *s[6:10])


def add_words(a, b):
    return struct.pack("<16I", *((x + y) & M32 for x, y in zip(a, b)))


def chacha20_block(key, counter, nonce12):
    state = (SIGMA + struct.unpack("<8I", key) + (counter,) +
             struct.unpack("<3I", nonce12))
    return add_words(chacha_rounds(state), state)


def salsa20_block(key, counter, nonce8):
    state = salsa_state(key, nonce8 + struct.pack("<Q", counter))
    return add_words(salsa_rounds(state), state)


def xor(a, b):
    return bytes(x ^ y for x, y in zip(a, b))


def poly1305(key, data):
    r = int.from_bytes(key[:16], "little") & 0x0ffffffc0ffffffc0ffffffc0fffffff
    acc = 0
    for i in range(0, len(data), 16):
        acc += int.from_bytes(data[i:i + 16] + b"\x01", "little")
        acc = acc * r % (2**130 - 5)
    acc += int.from_bytes(key[16:], "little")
    return (acc % 2**128).to_bytes(16, "little")


def xchacha20poly1305_encrypt(key, nonce24, plain, ad):
    subkey = hchacha20(key, nonce24[:16])
    nonce12 = bytes(4) + nonce24[16:]
    stream = b"".join(chacha20_block(subkey, 1 + i, nonce12)
                      for i in range((len(plain) + 63) // 64))
    cipher = xor(plain, stream)
    mac_data = (ad + bytes(-len(ad) % 16) + cipher +
                bytes(-len(cipher) % 16) +
                struct.pack("<QQ", len(ad), len(cipher)))
    return cipher + poly1305(chacha20_block(subkey, 0, nonce12)[:32], mac_data)


def secretbox(key, nonce24, plain):
    """XSalsa20-Poly1305 as in NaCl: the tag stands first"""
    subkey = hsalsa20(key, nonce24[:16])
    stream = b"".join(salsa20_block(subkey, i, nonce24[16:])
                      for i in range((32 + len(plain) + 63) // 64))
    cipher = xor(plain, stream[32:])
    return poly1305(stream[:32], cipher) + cipher


def blake2b(data, key=b""):
    return hashlib.blake2b(data, digest_size=32, key=key).digest()


def selftest():
    """Published values: RFC 8439 2.3.2 and 2.5.2, the XChaCha draft 2.2.1 and
    A.3.1, and 'firstkey' and 'beforenm' of the NaCl paper"""
    h = bytes.fromhex
    key = bytes(range(32))
    assert chacha20_block(key, 1, h("000000090000004a00000000"))[:16] == \
        h("10f1e7e4d13b5915500fdd1fa32071c4")
    assert poly1305(h("85d6be7857556d337f4452fe42d506a8"
                      "0103808afb0db2fd4abff6af4149f51b"),
                    b"Cryptographic Forum Research Group") == \
        h("a8061dc1305136c6c22b8baf0c0127a9")
    assert hchacha20(key, h("000000090000004a0000000031415927")) == \
        h("82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc")
    assert xchacha20poly1305_encrypt(
        bytes(range(0x80, 0xa0)), bytes(range(0x40, 0x58)),
        b"Ladies and Gentlemen of the class of '99: If I could offer you only "
        b"one tip for the future, sunscreen would be it.",
        h("50515253c0c1c2c3c4c5c6c7"))[-16:] == \
        h("c0875924c1c7987947deafd8780acf49")
    shared = h("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    first = h("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    assert hsalsa20(shared, bytes(16)) == first
    nonce = h("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
    assert secretbox(first, nonce, h("be075fc53c81f2d5"))[16:] == \
        h("8e993b9f48681273")


# ---- keys ----

P25519 = 2**255 - 19


class Node:
    """A key pair. label tells several keys of a node from each other. seed:
    that of a real key."""

    def __init__(self, name, label=None, seed=None):
        self.name = name
        self.seed = seed or blake2b(b"dovetail vectors key " +
                                    (label or name).encode())
        self.sign = Ed25519PrivateKey.from_private_bytes(self.seed)
        self.pk = self.sign.public_key().public_bytes(Encoding.Raw,
                                                      PublicFormat.Raw)
        self.id = blake2b(self.pk)[:8]
        # RFC 7748, 4.1: u = (1 + y) / (1 - y)
        y = int.from_bytes(self.pk, "little") & (2**255 - 1)
        self.box_pk = ((1 + y) * pow(1 - y, -1, P25519) %
                       P25519).to_bytes(32, "little")
        # clamped by X25519 itself, as any scalar is
        self.box = X25519PrivateKey.from_private_bytes(
            hashlib.sha512(self.seed).digest()[:32])
        assert self.box.public_key().public_bytes(
            Encoding.Raw, PublicFormat.Raw) == self.box_pk

    def shared(self, other):
        point = self.box.exchange(X25519PublicKey.from_public_bytes(
            other.box_pk))
        return hsalsa20(point, bytes(16))

    def secret_line(self):
        return "dovetail-secret-1 %s %s" % (
            self.name, base64.b64encode(self.seed).decode())

    def public_line(self):
        return "dovetail-public-1 %s %s" % (
            self.name, base64.b64encode(self.pk).decode())


# ---- primitives ----

def num(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7f | 0x80])
        n >>= 7
    return out + bytes([n])


def snum(n):
    return num(2 * n if n >= 0 else -2 * n - 1)


def bstr(s):
    if isinstance(s, str):
        s = s.encode()
    return num(len(s)) + s


def uids(ranges):
    out, lowest = num(len(ranges)), 1
    for first, last in ranges:
        out += num(first - lowest) + num(last - first)
        lowest = last + 2
    return out


# ---- the text that says what was decoded ----

def qstr(s):
    if len(s.encode()) > 64:
        return qdata(s.encode())
    return '"%s"' % s.replace("\t", "\\t")


def quids(ranges):
    return ",".join("%d" % a if a == b else "%d:%d" % (a, b)
                    for a, b in ranges)


def qdata(data):
    if len(data) <= 32:
        return data.hex()
    return "%d bytes blake2b %s" % (len(data), blake2b(data).hex())


# ---- changes: each gives bytes and text ----

GUID_A = bytes.fromhex("a1000000000000000000000000000001")
GUID_B = bytes.fromhex("b2000000000000000000000000000002")
NO_GUID = bytes(16)
SPOOL_ID = bytes(range(16))
BODY = b"Subject: hi\r\n\r\n"
KEY = bytes(range(0x40, 0x50))
SUM = bytes(range(0xf0, 0x100))
HASH = bytes(range(0xa0, 0xb0))

ANSWERED, FLAGGED, DELETED, SEEN, DRAFT = 1, 2, 4, 8, 16
SNAPSHOT, MORE, DIGEST, MESSAGES, ATTRIBUTES = 1, 2, 4, 8, 16
DEEP, EXPLAIN, REPAIR = 1, 2, 4
EQUAL, DIFFERENT, REPAIRED, UNKNOWN = range(1, 5)
CREATE, CREATE_DIR, DELETE, RENAME, SUBSCRIBE, UNSUBSCRIBE, UPDATE = range(1, 8)


def head(kind, user):
    return bytes([kind]) + bstr(user)


def digest(key=KEY, sum_=SUM, count=3):
    return (key + sum_ + num(count),
            "digest=%s:%s:%d" % (key.hex(), sum_.hex(), count))


def mailbox(ops=(), user="alice", guid=GUID_A, name="INBOX",
            uid_validity=1700000000, uid_next=8, modseq=42, flags=0,
            frm=(5, 1, 40), to=(5, 1, 96), digest_=None):
    data = (head(1, user) + guid + bstr(name) + num(uid_validity) +
            num(uid_next) + num(modseq) + bytes([flags]) +
            b"".join(map(num, frm)) + b"".join(map(num, to)) +
            (digest_[0] if digest_ else b"") +
            b"".join(op[0] for op in ops))
    text = ('mailbox user=%s guid=%s name=%s uid_validity=%d uid_next=%d '
            'highest_modseq=%d flags=%d from=%d:%d:%d to=%d:%d:%d' %
            (qstr(user), guid.hex(), qstr(name), uid_validity, uid_next,
             modseq, flags, *frm, *to))
    if digest_:
        text += " " + digest_[1]
    return data, text + "".join(" | " + op[1] for op in ops)


def append(uid=7, guid="1700000000.M1P2.mx", flags=0, keywords=(),
           received=1700000000, save=1700000001, uidl="", order=0,
           size=len(BODY), inline=None, spool=None, copy=None):
    data = (b"\x01" + num(uid) + bstr(guid) + bytes([flags]) +
            num(len(keywords)) + b"".join(map(bstr, keywords)) +
            snum(received) + snum(save) + bstr(uidl) + num(order) + num(size))
    if inline is not None:
        data += b"\x00" + inline
        body = "inline=" + qdata(inline)
    elif spool is not None:
        data += b"\x01" + spool
        body = "spool=" + spool.hex()
    else:
        data += b"\x02" + copy[0] + num(copy[1])
        body = "copy=%s:%d" % (copy[0].hex(), copy[1])
    return data, ("append uid=%d guid=%s flags=%d keywords=%s "
                  "received_date=%d save_date=%d pop3_uidl=%s "
                  "pop3_order=%d size=%d %s" %
                  (uid, qstr(guid), flags, ",".join(map(qstr, keywords)),
                   received, save, qstr(uidl), order, size, body))


def flags(add, remove, ranges):
    return (bytes([2, add, remove]) + uids(ranges),
            "flags add=%d remove=%d uids=%s" % (add, remove, quids(ranges)))


def keyword(type_, name, kw, ranges):
    return (bytes([type_]) + bstr(kw) + uids(ranges),
            "%s %s uids=%s" % (name, qstr(kw), quids(ranges)))


def keyword_add(kw, ranges):
    return keyword(3, "keyword_add", kw, ranges)


def keyword_remove(kw, ranges):
    return keyword(4, "keyword_remove", kw, ranges)


def uids_op(type_, name, ranges):
    return bytes([type_]) + uids(ranges), "%s uids=%s" % (name, quids(ranges))


def keyword_reset(ranges):
    return uids_op(5, "keyword_reset", ranges)


def expunge(ranges):
    return uids_op(6, "expunge", ranges)


def exists(ranges):
    return uids_op(7, "exists", ranges)


def attribute(key, value=None, shared=False):
    """as it stands in a COMPARED, and behind an op's type"""
    text = "attribute %s %s" % ("shared" if shared else "private", qstr(key))
    if value is None:
        return bytes([shared]) + bstr(key), text
    return (bytes([2 | shared]) + bstr(key) + bstr(value),
            text + " value=" + qstr(value))


def attribute_op(*args, **kw):
    data, text = attribute(*args, **kw)
    return b"\x08" + data, text


def list_(action, guid=NO_GUID, name="Archive", new_name="", uid_validity=0,
          uid_next=0, user="alice"):
    return (head(2, user) + bytes([action]) + guid + bstr(name) +
            bstr(new_name) + num(uid_validity) + num(uid_next),
            "list user=%s action=%d guid=%s name=%s new_name=%s "
            "uid_validity=%d uid_next=%d" %
            (qstr(user), action, guid.hex(), qstr(name), qstr(new_name),
             uid_validity, uid_next))


def tree(mailboxes, subscriptions, user="alice", number=0, flags=0,
         deleted=()):
    data = head(3, user) + num(len(mailboxes))
    text = "tree user=%s number=%d flags=%d" % (qstr(user), number, flags)
    for guid, name, uid_validity, uid_next in mailboxes:
        data += guid + bstr(name) + num(uid_validity) + num(uid_next)
        text += " | mailbox guid=%s name=%s uid_validity=%d uid_next=%d" % (
            guid.hex(), qstr(name), uid_validity, uid_next)
    data += num(len(subscriptions)) + b"".join(map(bstr, subscriptions))
    text += "".join(" | subscription " + qstr(s) for s in subscriptions)
    data += num(len(deleted)) + b"".join(deleted)
    text += "".join(" | deleted " + guid.hex() for guid in deleted)
    return data + num(number) + bytes([flags]), text


def request(guid=GUID_A, name="INBOX", uid_next=8, ranges=(), user="alice"):
    return (head(4, user) + guid + bstr(name) + num(uid_next) + uids(ranges),
            "request user=%s guid=%s name=%s uid_next=%d uids=%s" %
            (qstr(user), guid.hex(), qstr(name), uid_next, quids(ranges)))


def spool(data, offset=0, user="alice"):
    return (head(5, user) + SPOOL_ID + num(offset) + data,
            "spool user=%s id=%s offset=%d data=%s" %
            (qstr(user), SPOOL_ID.hex(), offset, qdata(data)))


def heartbeat(user=""):
    return head(6, user), "heartbeat"


SHARD_REQUEST, SHARD_SWEPT = 7, 8


def shard_change(kind, shard=3, node="node-1.b", number=2**32 - 1, user=""):
    return (head(kind, user) + bytes([shard]) + bstr(node) + num(number),
            "%s shard=%d node=%s number=%d" %
            ("shard_request" if kind == SHARD_REQUEST else "shard_swept",
             shard, qstr(node), number))


def verify(number=7, flags=0, guid=GUID_A, name="INBOX",
           uid_validity=1700000000, digest_=None, at=(5, 1, 96), user="alice",
           attributes=HASH):
    digest_ = digest_ or digest()
    return (head(9, user) + num(number) + bytes([flags]) + guid + bstr(name) +
            num(uid_validity) + b"".join(map(num, at)) + digest_[0] +
            attributes,
            "verify user=%s number=%d flags=%d guid=%s name=%s "
            "uid_validity=%d at=%d:%d:%d %s attributes=%s" %
            (qstr(user), number, flags, guid.hex(), qstr(name), uid_validity,
             *at, digest_[1], attributes.hex()))


def verified(result=EQUAL, texts=(), node="b", number=7, guid=GUID_A,
             messages=3, user="alice"):
    return (head(10, user) + bstr(node) + num(number) + guid +
            bytes([result]) + num(messages) + num(len(texts)) +
            b"".join(map(bstr, texts)),
            "verified user=%s node=%s number=%d guid=%s result=%d "
            "messages=%d" %
            (qstr(user), qstr(node), number, guid.hex(), result, messages) +
            "".join(" | text " + qstr(text) for text in texts))


def ranges_(ranges):
    """of (uid1, uid2, count, sum)"""
    return (num(len(ranges)) +
            b"".join(num(uid1) + num(uid2 - uid1) + num(count) + sum_
                     for uid1, uid2, count, sum_ in ranges),
            "".join(" | range %d:%d count=%d sum=%s" %
                    (uid1, uid2, count, sum_.hex())
                    for uid1, uid2, count, sum_ in ranges))


def compare(ranges=(), guid=GUID_A, name="INBOX", number=7, key=KEY,
            user="alice"):
    data, text = ranges_(ranges)
    return (head(11, user) + guid + bstr(name) + num(number) + key + data,
            "compare user=%s guid=%s name=%s number=%d key=%s" %
            (qstr(user), guid.hex(), qstr(name), number, key.hex()) + text)


def compared_message(uid, flags=0, keywords=(), hash_=HASH):
    return (num(uid) + bytes([flags]) + num(len(keywords)) +
            b"".join(map(bstr, keywords)) + hash_,
            " | message uid=%d flags=%d keywords=%s hash=%s" %
            (uid, flags, ",".join(map(qstr, keywords)), hash_.hex()))


def compared(ranges=(), uid_ranges=(), messages=(), guid=GUID_A, number=7,
             uid_validity=1700000000, uid_next=8, modseq=42, at=(5, 1, 96),
             user="alice", attributes=None):
    """attributes: None: not with them"""
    data, text = ranges_(ranges)
    with_attributes = attributes is not None
    return (head(12, user) + guid + num(number) + num(uid_validity) +
            num(uid_next) + num(modseq) + b"".join(map(num, at)) + data +
            uids(uid_ranges) +
            num(len(messages)) + b"".join(m[0] for m in messages) +
            bytes([with_attributes]) +
            (num(len(attributes)) + b"".join(a[0] for a in attributes)
             if with_attributes else b""),
            "compared user=%s guid=%s number=%d uid_validity=%d uid_next=%d "
            "highest_modseq=%d at=%d:%d:%d%s | uids=%s" %
            (qstr(user), guid.hex(), number, uid_validity, uid_next, modseq,
             *at, text, quids(uid_ranges)) +
            "".join(m[1] for m in messages) +
            " | with_attributes=%d" % with_attributes +
            "".join(" | " + a[1] for a in attributes or ()))


# ---- digests ----

def blake2b_128(data, key=b""):
    return hashlib.blake2b(data, digest_size=16, key=key).digest()


def message_hash(guid, received, body):
    body = body.replace(b"\r\n", b"\n")
    return blake2b_128(guid + struct.pack("<qQ", received, len(body)) +
                       blake2b(body))


def add_128(numbers):
    return (sum(int.from_bytes(n, "little") for n in numbers) %
            2**128).to_bytes(16, "little")


def keyword_sum(keywords):
    # bytes.lower() is of ASCII only
    return add_128(blake2b_128(k.encode().lower()) for k in keywords)


def short_sum(keywords):
    """what an element has of it"""
    return keyword_sum(keywords)[:7] + bytes(9)


def element(key, uid, flags, keywords, message):
    return blake2b_128(struct.pack("<IB", uid, flags) + keywords + message,
                       key)


# ---- entries ----

class Chain:
    """What the reader has: the text of the chain= word"""

    def __init__(self, epoch, generation, seq, hash_):
        self.text = "%d/%d-%d/%s" % (epoch, generation, seq, hash_.hex())


class Entry:
    """An entry, sealed on construction. patch(bytearray, what) may change the
    bytes before they are hashed and signed: "ad" before the encryption,
    "signed" after it."""

    def __init__(self, origin, recipients, payload, kind=1, shard=0, shards=4,
                 epoch=1, generation=100, seq=1, time=1700000000123456,
                 prev=bytes(32), key_id=None, signer=None, patch=None,
                 patch_signed=None, message_key=None):
        self.kind, self.shard, self.shards = kind, shard, shards
        self.epoch, self.generation, self.seq = epoch, generation, seq
        self.time, self.prev, self.origin = time, prev, origin
        self.payload = payload
        secret = repr((origin.name, [r.name for r in recipients], payload,
                       kind, shard, shards, epoch, generation, seq, time,
                       prev)).encode()
        key = message_key or blake2b(b"message key " + secret)
        nonce = blake2b(b"nonce " + secret)[:24]
        ad = bytearray(
            b"DVTL" + bytes([1, kind, shard, shards]) +
            struct.pack(">QQQQ", epoch, generation, seq, time) +
            (key_id or origin.id) + prev + bytes([len(recipients)]))
        for r in recipients:
            ad += r.id + secretbox(origin.shared(r), nonce, key)
        ad += nonce + struct.pack(">I", len(payload) + 16)
        if patch:
            patch(ad)
        cipher = xchacha20poly1305_encrypt(key, nonce, payload, bytes(ad))
        signed = bytearray(bytes(ad) + cipher)
        self.ad_size = len(ad)
        if patch_signed:
            patch_signed(signed)
        self.hash = blake2b(bytes(signed))
        signer = signer or origin
        self.bytes = bytes(signed) + (
            signer.sign.sign(self.hash) if kind != 2 else
            b"".join(blake2b(self.hash, signer.shared(r)) for r in recipients))

    def text(self, gap=False):
        return ("kind=%d shard=%d shards=%d epoch=%d generation=%d seq=%d "
                "time=%d prev=%s origin=%s hash=%s gap=%d payload=%s" %
                (self.kind, self.shard, self.shards, self.epoch,
                 self.generation, self.seq, self.time, self.prev.hex(),
                 self.origin.name, self.hash.hex(), gap, qdata(self.payload)))

    def chain(self):
        return Chain(self.epoch, self.generation, self.seq, self.hash)


def ack(generation=1, seq=2, time=1700000000000000, entries=3, rejected=0,
        set_aside=0, failed=(), last_error="", troubles=b""):
    return (num(generation) + num(seq) + num(time) + num(entries) +
            num(rejected) + num(set_aside) + num(len(failed)) +
            b"".join(num(g) + num(s) + num(o) for g, s, o in failed) +
            bstr(last_error) +
            (num(len(troubles)) + troubles if troubles else b""),
            "generation=%d seq=%d applied_time=%d entries=%d rejected=%d "
            "set_aside=%d failed=%s last_error=%s%s" %
            (generation, seq, time, entries, rejected, set_aside,
             ",".join("%d-%d/%d" % f for f in failed), qstr(last_error),
             " troubles=" + troubles.hex() if troubles else ""))


# ---- files ----

FORMAT = """\
# Made by make-vectors.py; do not edit.
#
# A comment says which rule the vector under it pins. Then two lines follow:
#   WHAT [WORD=VALUE ...] BYTES   what is read, and how
#   = TEXT                        it is accepted and means TEXT, or
#   ! WORDS                       it is refused and the error has all WORDS
# BYTES are hex, in pieces; HEX*COUNT is a piece repeated.
# What is accepted must also encode to the same bytes again (num, snum, uids,
# change, ack).
"""


class File:
    def __init__(self, about):
        self.lines = [FORMAT + "#\n# " + about.replace("\n", "\n# ")]

    def vector(self, rule, what, data, outcome):
        if isinstance(data, bytes):
            data = data.hex()
        self.lines.append("\n# %s\n%s %s\n%s" % (rule, what, data, outcome))

    def ok(self, rule, what, data, text):
        self.vector(rule, what, data, "= " + text)

    def bad(self, rule, what, data, words):
        self.vector(rule, what, data, "! " + words)

    def write(self, path):
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(line.rstrip(" ") for line in
                              "\n".join(self.lines).split("\n")) + "\n")


def make_primitives():
    f = File("Numbers and uid sets; see \"Primitives\" in dovetail-wire.h.")
    for n in (0, 127, 128, 300, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        f.ok("num: 7 bits a byte, lowest first", "num", num(n), str(n))
    f.bad("num: nothing there", "num", b"", "")
    f.bad("num: cut off", "num", b"\x80", "")
    f.bad("num: zero in two bytes is not the shortest form", "num",
          b"\x80\x00", "")
    f.bad("num: 300 in three bytes", "num", b"\xac\x82\x00", "")
    f.bad("num: 65 bits", "num", b"\xff" * 9 + b"\x02", "")
    f.bad("num: ten bytes, the tenth zero", "num", b"\x80" * 9 + b"\x00", "")
    f.bad("num: eleven bytes", "num", b"\x80" * 10 + b"\x01", "")
    f.bad("num: ten bytes that all say there is more", "num", b"\x80" * 10, "")
    f.bad("num: a byte left over", "num", b"\x05\x00", "")
    for n in (0, -1, 1, -2, 63, -64, 64, -1700000000, 2**63 - 1, -2**63):
        f.ok("snum: zigzag", "snum", snum(n), str(n))
    f.bad("snum: 65 bits", "snum", b"\xff" * 9 + b"\x03", "")
    for ranges in ([], [(1, 1)], [(1, 1), (3, 3)], [(5, 10), (12, 13)],
                   [(1, 4294967295)], [(4294967295, 4294967295)],
                   [(1, 4294967293), (4294967295, 4294967295)]):
        f.ok("uids: distances, ranges never touch", "uids", uids(ranges),
             quids(ranges))
    f.bad("uids: past the last uid", "uids", num(1) + num(2**32 - 1) + num(0),
          "")
    f.bad("uids: range past the last uid", "uids",
          num(1) + num(1) + num(2**32 - 2), "")
    f.bad("uids: distance of more than 32 bits", "uids",
          num(1) + num(2**64 - 1) + num(1), "")
    f.bad("uids: a range after the last uid", "uids",
          num(2) + num(0) + num(2**32 - 2) + num(0) + num(0), "")
    f.bad("uids: count without ranges", "uids", num(1), "")
    f.bad("uids: count larger than the bytes left could hold", "uids",
          num(2**64 - 1) + num(0) * 2, "")
    f.bad("uids: distance in a longer form", "uids", b"\x01\x80\x00\x00", "")
    return f


def make_changes():
    f = File("Changes, accepted: each kind, each op, each body source.")

    def ok(rule, change):
        f.ok(rule, "change", *change)

    ok("HEARTBEAT is the only kind without a user", heartbeat())
    ok("MAILBOX without ops: only numbers changed", mailbox())
    ok("MAILBOX: the largest numbers",
       mailbox(uid_validity=2**32 - 1, uid_next=2**32 - 1, modseq=2**64 - 1,
               frm=(2**32 - 1,) * 3, to=(2**32 - 1,) * 3))
    ok("MAILBOX: no position before", mailbox(frm=(0, 0, 0)))
    ok("a name's components are joined with TAB; names are UTF-8",
       mailbox(name="Archiv\tPrüfung", user="jürgen@example.org"))
    ok("APPEND, body INLINE", mailbox([append(inline=BODY)]))
    ok("APPEND, empty body INLINE", mailbox([append(inline=b"", size=0)]))
    ok("APPEND, body SPOOL", mailbox([append(spool=SPOOL_ID, size=10**9)]))
    ok("APPEND, body COPY", mailbox([append(copy=(GUID_B, 3))]))
    ok("APPEND with everything",
       mailbox([append(uid=2**32 - 1, guid="0123456789abcdef" * 2, flags=0x1f,
                       keywords=["$Forwarded", "NonJunk"], uidl="UID7-1",
                       order=2**32 - 1, size=2**64 - 1, spool=SPOOL_ID)]))
    ok("APPEND, no GUID in the storage", mailbox([append(guid="", inline=BODY)]))
    ok("dates before 1970 are negative, and may not fit 32 bits",
       mailbox([append(received=-1, save=-62135596800, inline=BODY)]))
    ok("FLAGS", mailbox([flags(SEEN | FLAGGED, DELETED, [(1, 3), (7, 7)])]))
    ok("KEYWORD_ADD", mailbox([keyword_add("$Label1", [(2, 2)])]))
    ok("KEYWORD_REMOVE", mailbox([keyword_remove("$Label1", [(2, 2)])]))
    ok("KEYWORD_RESET", mailbox([keyword_reset([(1, 7)])]))
    ok("EXPUNGE", mailbox([expunge([(1, 1), (3, 4), (6, 4294967295)])]))
    ok("ops keep their order",
       mailbox([append(inline=BODY), flags(SEEN, 0, [(7, 7)]),
                keyword_add("a", [(7, 7)]), expunge([(7, 7)])]))
    ok("ATTRIBUTE", mailbox([attribute_op("comment", "Prüfung")]))
    ok("ATTRIBUTE, shared, of an empty value",
       mailbox([attribute_op("vendor/vendor.dovecot/x", "", True)]))
    ok("ATTRIBUTE that is gone", mailbox([attribute_op("comment")]))
    ok("ATTRIBUTE, shared, that is gone",
       mailbox([attribute_op("comment", shared=True)]))
    ok("ATTRIBUTE, the longest key", mailbox([attribute_op("k" * 1000, "v")]))
    data, text = mailbox([attribute_op("k", "v" * 65536)])
    f.ok("ATTRIBUTE, the largest value", "change",
         data[:-65536].hex() + " 76*65536", text)
    ok("SNAPSHOT with all ATTRIBUTES",
       mailbox([exists([(1, 1)]), attribute_op("a", "1"),
                attribute_op("a", "2", True)],
               flags=SNAPSHOT | ATTRIBUTES, frm=(0, 0, 0)))
    ok("SNAPSHOT: EXISTS stands first",
       mailbox([exists([(1, 2), (5, 5)]), flags(SEEN, 0, [(5, 5)]),
                keyword_add("a", [(1, 1)]), append(copy=(GUID_A, 7))],
               flags=SNAPSHOT, frm=(0, 0, 0)))
    ok("SNAPSHOT: EXISTS may be empty; MORE follows",
       mailbox([exists([]), append(uid=1, inline=BODY)],
               flags=SNAPSHOT | MORE, frm=(0, 0, 0)))
    ok("MAILBOX with its DIGEST", mailbox(flags=DIGEST, digest_=digest()))
    ok("DIGEST stands before the ops",
       mailbox([append(inline=BODY), expunge([(1, 1)])], flags=DIGEST,
               digest_=digest(KEY[::-1], SUM[::-1], 2**32 - 1)))
    ok("DIGEST of no messages",
       mailbox(flags=DIGEST, digest_=digest(sum_=bytes(16), count=0)))
    ok("SNAPSHOT with DIGEST",
       mailbox([exists([])], flags=SNAPSHOT | DIGEST, frm=(0, 0, 0),
               digest_=digest()))
    ok("MESSAGES", mailbox([append(inline=BODY), append(2, copy=(GUID_B, 3))],
                           flags=MESSAGES, frm=(0, 0, 0), to=(0, 0, 0)))
    ok("MESSAGES, and MORE of them",
       mailbox([append(inline=BODY)], flags=MESSAGES | MORE, frm=(0, 0, 0),
               to=(0, 0, 0)))
    ok("MESSAGES, all gone",
       mailbox(flags=MESSAGES, frm=(0, 0, 0), to=(0, 0, 0)))
    ok("LIST CREATE", list_(CREATE, GUID_A, uid_validity=9, uid_next=1))
    ok("LIST CREATE_DIR has no GUID", list_(CREATE_DIR))
    ok("LIST DELETE of a mailbox", list_(DELETE, GUID_A))
    ok("LIST DELETE of a name that cannot be selected", list_(DELETE))
    ok("LIST RENAME", list_(RENAME, GUID_A, "Old\tx", "New\tx"))
    ok("LIST SUBSCRIBE", list_(SUBSCRIBE))
    ok("LIST UNSUBSCRIBE", list_(UNSUBSCRIBE))
    ok("LIST UPDATE", list_(UPDATE, GUID_A, uid_validity=10, uid_next=100))
    ok("TREE", tree([(GUID_A, "INBOX", 1, 2), (NO_GUID, "Archive", 0, 0),
                     (GUID_B, "Archive\t2026", 3, 4)],
                    ["INBOX", "Shared\tbob"]))
    ok("TREE, empty", tree([], []))
    ok("TREE with deletions", tree([(GUID_A, "INBOX", 1, 2)], [],
                                   deleted=[GUID_B, GUID_A]))
    ok("TREE to be compared", tree([(GUID_A, "INBOX", 1, 2)], ["INBOX"],
                                   number=2**32 - 1))
    ok("TREE to be compared, made equal, and told of",
       tree([], [], number=1, flags=DEEP | EXPLAIN | REPAIR))
    ok("REQUEST for a mailbox", request())
    ok("REQUEST for the user", request(NO_GUID, "", 0))
    ok("REQUEST for a mailbox from its beginning", request(uid_next=0))
    ok("REQUEST for single messages",
       request(uid_next=0, ranges=[(1, 1), (5, 9), (2**32 - 1, 2**32 - 1)]))
    ok("REQUEST for single messages, of a mailbox whose name is not known",
       request(name="", uid_next=0, ranges=[(1, 2**32 - 1)]))
    ok("SHARD_REQUEST", shard_change(SHARD_REQUEST))
    ok("SHARD_REQUEST, the largest shard", shard_change(SHARD_REQUEST, 255))
    ok("SHARD_SWEPT", shard_change(SHARD_SWEPT, 0, "a", 0))
    ok("VERIFY", verify())
    ok("VERIFY that nobody asked for, of no name",
       verify(0, name="", uid_validity=0))
    ok("VERIFY with everything",
       verify(2**32 - 1, DEEP | EXPLAIN | REPAIR, GUID_B, "Archiv\tPrüfung",
              2**32 - 1, digest(count=2**32 - 1)))
    ok("VERIFY that says nothing of attributes",
       verify(attributes=bytes(16)))
    ok("VERIFIED: equal", verified())
    ok("VERIFIED: different, and how",
       verified(DIFFERENT, ["uid 5: flags", "uid 7: is not there"]))
    ok("VERIFIED: repaired", verified(REPAIRED, messages=2**32 - 1))
    ok("VERIFIED: the shortest texts", verified(DIFFERENT, ["a", "b", "c"]))
    ok("VERIFIED: could not tell why, of the tree",
       verified(UNKNOWN, ["Prüfung: mailbox is locked"], "node-1.b",
                2**32 - 1, NO_GUID, 0))
    data, text = verified(DIFFERENT, ["a" * 1000] + ["b"] * 99)
    f.ok("VERIFIED: as many texts as may be, one as long as it may be",
         "change", data[:-1000 - 99 * 2].hex() + " 61*1000 0162*99", text)
    ok("COMPARE without ranges", compare())
    ok("COMPARE",
       compare([(1, 1, 1, SUM), (2, 100, 99, bytes(16)),
                (200, 2**32 - 1, 0, SUM)], GUID_B, "Archiv\tPrüfung",
               2**32 - 1, SUM))
    ok("COMPARE: a range of all messages there can be",
       compare([(1, 2**32 - 1, 2**32 - 1, SUM)], name="", number=0))
    ok("COMPARED: all is equal", compared())
    ok("COMPARED: finer ranges",
       compared([(1, 50, 50, SUM), (51, 99, 1, SUM)]))
    ok("COMPARED: messages",
       compared((), [(1, 7), (9, 2**32 - 1)],
                [compared_message(1),
                 compared_message(7, 0x1f, ["$Junk", "b"]),
                 compared_message(2**32 - 1, SEEN, ["a"], SUM)]))
    ok("COMPARED: the shortest messages",
       compared((), [(1, 3)], [compared_message(uid) for uid in (1, 2, 3)]))
    ok("COMPARED: none of these messages is there", compared((), [(1, 7)]))
    ok("COMPARED: without any attribute", compared(attributes=()))
    ok("COMPARED: attributes, private ones first",
       compared(attributes=[attribute("a", "1"), attribute("aa", ""),
                            attribute("b", "2"), attribute("a", "3", True)]))
    ok("COMPARED: messages and attributes",
       compared((), [(1, 1)], [compared_message(1)],
                attributes=[attribute("comment", "x")]))
    ok("COMPARED: the largest numbers, ranges and messages",
       compared([(1, 1, 0, SUM)], [(5, 5)], [compared_message(5)], GUID_B,
                2**32 - 1, 2**32 - 1, 2**32 - 1, 2**64 - 1))
    ok("SPOOL", spool(b"piece of a body", 131072))
    data, text = spool(b"a" * 131072)
    f.ok("SPOOL, the largest chunk", "change",
         data[:-131072].hex() + " 61*131072", text)
    data, text = mailbox([append(inline=b"a" * 65536, size=65536)])
    f.ok("APPEND, the largest body INLINE", "change",
         data[:-65536].hex() + " 61*65536", text)
    data, text = request(name="a" * (4 * 1024 * 1024 - 29), uid_next=8)
    assert len(data) == 4 * 1024 * 1024
    f.ok("the largest change", "change",
         data[:27].hex() + " 61*%d 08 00" % (4 * 1024 * 1024 - 29), text)
    return f


def bad_verify(bad):
    bad("VERIFY without a user", verify(user=""), "verify: user")
    bad("VERIFY: number of 33 bits", verify(2**32), "verify: number")
    bad("VERIFY: unknown flag", verify(flags=8), "verify: flags")
    bad("VERIFY without GUID", verify(guid=NO_GUID), "verify: guid")
    bad("VERIFY: name with a NUL", verify(name="a\0b"), "verify: name")
    bad("VERIFY: uid_validity of 33 bits", verify(uid_validity=2**32),
        "verify: uid_validity")
    bad("VERIFY: digest of a count of 33 bits",
        verify(digest_=digest(count=2**32)), "verify: count")
    data = verify(digest_=digest(count=3))[0]
    for size, field in ((1, "attributes"), (16, "attributes"),
                        (17, "count"), (18, "digest"), (33, "digest"),
                        (34, "key"), (49, "key"), (50, "at"), (52, "at"),
                        (53, "uid_validity"), (58, "name"), (63, "name"),
                        (64, "guid"), (80, "flags"), (81, "number")):
        bad("VERIFY cut off, %d bytes from its end" % size, data[:-size],
            "verify: %s is cut off" % field)
    bad("VERIFY with a byte left over", data + b"\x00", "verify: end")


def bad_verified(f, bad):
    bad("VERIFIED without a user", verified(user=""), "verified: user")
    bad("VERIFIED without node", verified(node=""), "verified: node")
    bad("VERIFIED: a node of a wrong name", verified(node="B"),
        "verified: node")
    bad("VERIFIED: a node's name of 65 bytes", verified(node="b" * 65),
        "verified: node")
    bad("VERIFIED: number of 33 bits", verified(number=2**32),
        "verified: number")
    bad("VERIFIED: result 0", verified(0), "verified: result")
    bad("VERIFIED: result of a newer version", verified(5), "verified: result")
    bad("VERIFIED: messages of 33 bits", verified(messages=2**32),
        "verified: messages")
    for char in "\0\n\r\t\x1b\x1f\x7f":
        for text in (char, "a" + char, char + "b", "a" + char + "b"):
            bad("VERIFIED: text with a control character",
                verified(UNKNOWN, ["fine", text]), "verified: text")
    bad("VERIFIED: empty text", verified(UNKNOWN, [""]),
        "verified: text")
    bad("VERIFIED: empty text, and another", verified(UNKNOWN, ["", "ab"]),
        "verified: text is empty")
    f.bad("VERIFIED: text of 1001 bytes", "change",
          verified()[0][:-1].hex() + " 01e907 61*1001",
          "verified: text is too long")
    f.bad("VERIFIED: 101 texts", "change",
          verified()[0][:-1].hex() + " 65 0161*101",
          "verified: texts are too many")
    bad("VERIFIED: more texts than bytes left",
        verified()[0][:-1] + num(2**32 - 1) + bstr("a"), "verified: texts")
    data = verified(DIFFERENT, ["uid 5"])[0]
    for size, field in ((1, "text"), (5, "text"), (7, "texts"),
                        (8, "messages"), (9, "result"), (10, "guid"),
                        (26, "number"), (27, "node"), (28, "node")):
        bad("VERIFIED cut off, %d bytes from its end" % size, data[:-size],
            "verified: " + field)
    bad("VERIFIED with a byte left over", data + b"\x00", "verified: end")


def bad_ranges(f, bad, kind, make):
    """make: gives a change of these ranges and nothing behind them"""
    kind = kind + ": "
    what = kind.upper()

    def raw(count, *parts):
        return make()[0][:-1] + num(count) + b"".join(parts)

    bad(what + "range from uid 0", make([(0, 5, 1, SUM)]), kind + "uid1")
    bad(what + "range from a uid of 33 bits",
        raw(1, num(2**32), num(0), num(0), SUM), kind + "uid1")
    bad(what + "range past the last uid", make([(2, 2**32, 0, SUM)]),
        kind + "ranges are not in order")
    bad(what + "range of more than 32 bits",
        raw(1, num(1), num(2**32), num(0), SUM), kind + "uid2")
    bad(what + "ranges that meet", make([(1, 5, 1, SUM), (5, 6, 1, SUM)]),
        kind + "ranges are not in order")
    bad(what + "ranges that go down", make([(5, 5, 1, SUM), (1, 1, 1, SUM)]),
        kind + "ranges are not in order")
    bad(what + "a range after the last uid",
        make([(5, 2**32 - 1, 1, SUM), (1, 1, 1, SUM)]),
        kind + "ranges are not in order")
    bad(what + "more messages than uids, one uid", make([(5, 5, 2, SUM)]),
        kind + "count")
    bad(what + "more messages than uids, many", make([(11, 20, 11, SUM)]),
        kind + "count")
    bad(what + "count of 33 bits", make([(1, 2**32 - 1, 2**32, SUM)]),
        kind + "count")
    bad(what + "sum cut off",
        raw(1, num(2**31), num(0), num(1), SUM[:-1]), kind + "sum")
    bad(what + "more ranges than bytes", raw(2, num(1), num(0), num(1), SUM),
        kind + "ranges")
    bad(what + "a count no machine has",
        raw(2**64 - 1, num(1), num(0), num(1), SUM), kind + "ranges")
    f.bad(what + "4097 ranges", "change",
          raw(4097).hex() + " %s*4097" % (b"\1\0\1" + SUM).hex(),
          kind + "ranges are too many")


def bad_compare(f, bad):
    bad("COMPARE without a user", compare(user=""), "compare: user")
    bad("COMPARE without GUID", compare(guid=NO_GUID), "compare: guid")
    bad("COMPARE: name with a NUL", compare(name="a\0b"), "compare: name")
    bad("COMPARE: number of 33 bits", compare(number=2**32),
        "compare: number")
    data = compare()[0]
    for size, field in ((1, "ranges"), (2, "key"), (17, "key"), (18, "number"),
                        (19, "name"), (24, "name"), (25, "guid")):
        bad("COMPARE cut off, %d bytes from its end" % size, data[:-size],
            "compare: %s is cut off" % field)
    bad_ranges(f, bad, "compare", compare)
    bad("COMPARE with a byte left over",
        compare([(1, 5, 1, SUM)])[0] + b"\x00", "compare: end")


def bad_compared(f, bad):
    bad("COMPARED without a user", compared(user=""), "compared: user")
    bad("COMPARED without GUID", compared(guid=NO_GUID), "compared: guid")
    bad("COMPARED: number of 33 bits", compared(number=2**32),
        "compared: number")
    bad("COMPARED: uid_validity of 33 bits", compared(uid_validity=2**32),
        "compared: uid_validity")
    bad("COMPARED: uid_next of 33 bits", compared(uid_next=2**32),
        "compared: uid_next")
    bad("COMPARED: highest_modseq of 65 bits",
        compared(modseq=2**64), "compared: highest_modseq")
    data = compared()[0]
    for size, field in ((1, "with_attributes"), (2, "messages"), (3, "uids"),
                        (4, "ranges"), (5, "at"), (7, "at"),
                        (8, "highest_modseq"), (9, "uid_next"),
                        (10, "uid_validity"), (15, "number"), (16, "guid")):
        bad("COMPARED cut off, %d bytes from its end" % size, data[:-size],
            "compared: %s is cut off" % field)
    # nothing is read behind ranges that are refused
    bad_ranges(f, bad, "compared",
               lambda ranges=(): (compared(ranges)[0][:-3], ""))
    bad("COMPARED: more uids than bytes",
        data[:-3] + num(2**32) + num(0) * 2, "compared: uids")
    bad("COMPARED: a uid past the last",
        data[:-3] + num(1) + num(2**32 - 1) + num(0) + num(0),
        "compared: uids")

    def message(*messages, uid_ranges=((1, 3), (5, 9))):
        return compared((), uid_ranges, messages)

    one = compared_message(5, SEEN, ["a"])
    for size, field in ((2, "hash"), (17, "hash"), (18, "keywords"),
                        (19, "keywords")):
        bad("COMPARED: message cut off, %d bytes from its end" % size,
            message(compared_message(5, SEEN, ["a" * 40]))[0][:-size],
            "compared: " + field)
    bad("COMPARED: message of uid 0", message(compared_message(0)),
        "compared: uid is zero")
    bad("COMPARED: message of a uid of 33 bits",
        message(compared_message(2**32)), "compared: uid")
    bad("COMPARED: message whose uid is none of uids",
        message(compared_message(4)), "compared: uid is out of place")
    bad("COMPARED: message behind uids", message(compared_message(10)),
        "compared: uid is out of place")
    bad("COMPARED: message without uids", message(one, uid_ranges=()),
        "compared: uid is out of place")
    bad("COMPARED: a message twice", message(one, one),
        "compared: uid is out of place")
    bad("COMPARED: messages that go down",
        message(one, compared_message(3)), "compared: uid is out of place")
    bad("COMPARED: \\Recent does not travel",
        message(compared_message(5, 0x20)), "compared: flags")
    bad("COMPARED: empty keyword", message(compared_message(5, 0, [""])),
        "compared: keywords")
    bad("COMPARED: keyword with a NUL",
        message(compared_message(5, 0, ["\0"])), "compared: keywords")
    bad("COMPARED: more keywords than bytes",
        message()[0][:-2] + num(1) + num(5) + b"\0" + num(2**32 - 1) + HASH,
        "compared: keywords")
    bad("COMPARED: more messages than bytes",
        message()[0][:-2] + num(2) + one[0], "compared: messages")
    bad("COMPARED: a count no machine has",
        message()[0][:-2] + num(2**64 - 1) + one[0], "compared: messages")
    bad("COMPARED with a byte left over", message(one)[0] + b"\x00",
        "compared: end")
    bad("COMPARED: with_attributes of 2", data[:-1] + b"\x02",
        "compared: with_attributes")
    bad("COMPARED: more attributes than bytes",
        compared(attributes=())[0][:-1] + num(2) + attribute("a", "b")[0],
        "compared: attributes")
    bad("COMPARED: attributes cut off",
        compared(attributes=[attribute("a", "bcd")])[0][:-1],
        "compared: attribute value")
    for name, pair in (
            ("twice", [attribute("a", "1"), attribute("a", "2")]),
            ("that go down", [attribute("b", "1"), attribute("a", "1")]),
            ("with a shared one first",
             [attribute("a", "1", True), attribute("b", "1")])):
        bad("COMPARED: attributes " + name, compared(attributes=pair),
            "compared: attributes are not in order")
    bad("COMPARED: attribute without a value",
        compared(attributes=[attribute("abc")]),
        "compared: attribute value is missing")


def make_refused_changes():
    f = File("Changes, refused.")

    def bad(rule, change, words):
        f.bad(rule, "change", change[0] if isinstance(change, tuple)
              else change, words)

    def box(op, **kw):
        """a MAILBOX whose first op has these bytes"""
        return mailbox([(op, "")], **kw)

    app = append(inline=BODY)[0]
    bad("nothing", b"", "change: kind")
    bad("kind 0", head(0, "u"), "change: kind")
    bad("kind of a newer version", head(13, "u"), "change: kind")
    bad("HEARTBEAT with a user", heartbeat("u"), "heartbeat: user")
    bad("HEARTBEAT with a byte left over", heartbeat()[0] + b"\x00",
        "heartbeat: end")
    bad("another kind without a user", request(user=""), "request: user")
    bad("user with a NUL", request(user="a\0b"), "request: user")
    bad("user longer than the change", b"\x06\x05abcd", "user")
    bad("MAILBOX cut off in its GUID", mailbox()[0][:10],
        "mailbox change: guid")
    bad("MAILBOX without GUID", mailbox(guid=NO_GUID), "mailbox change: guid")
    bad("MAILBOX cut off before to", mailbox()[0][:-3], "mailbox change: to")
    bad("MAILBOX: uid_validity of 33 bits", mailbox(uid_validity=2**32),
        "mailbox change: uid_validity")
    bad("MAILBOX: uid_next of 33 bits", mailbox(uid_next=2**32),
        "mailbox change: uid_next")
    bad("MAILBOX: file_offset of 33 bits", mailbox(to=(1, 1, 2**32)),
        "mailbox change: to")
    bad("MAILBOX: unknown flag", mailbox(flags=32), "mailbox change: flags")
    bad("MAILBOX: MORE goes with SNAPSHOT and MESSAGES only",
        mailbox(flags=MORE), "mailbox change: flags")
    bad("MAILBOX: MORE does not go with DIGEST alone",
        mailbox(flags=MORE | DIGEST, digest_=digest()),
        "mailbox change: flags")
    dig = mailbox(flags=DIGEST, digest_=digest())[0]
    bad("MAILBOX: DIGEST is missing", mailbox(flags=DIGEST),
        "mailbox change: key")
    bad("MAILBOX: DIGEST cut off in its key", dig[:-18],
        "mailbox change: key")
    bad("MAILBOX: DIGEST cut off in its sum", dig[:-2],
        "mailbox change: digest")
    bad("MAILBOX: DIGEST cut off before its count", dig[:-1],
        "mailbox change: count")
    bad("MAILBOX: DIGEST of a count of 33 bits",
        mailbox(flags=DIGEST, digest_=digest(count=2**32)),
        "mailbox change: count")
    bad("MAILBOX: DIGEST without its flag: no op begins so",
        mailbox(digest_=digest()), "mailbox change: op 1: type")
    zero = {"frm": (0, 0, 0), "to": (0, 0, 0)}
    bad("MESSAGES are no SNAPSHOT", mailbox(flags=MESSAGES | SNAPSHOT, **zero),
        "mailbox change: flags")
    bad("MESSAGES have no DIGEST",
        mailbox(flags=MESSAGES | DIGEST, digest_=digest(), **zero),
        "mailbox change: flags")
    for pos in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        bad("MESSAGES have no position before",
            mailbox(flags=MESSAGES, frm=pos, to=(0, 0, 0)),
            "mailbox change: to")
        bad("MESSAGES have no position",
            mailbox(flags=MESSAGES, frm=(0, 0, 0), to=pos),
            "mailbox change: to")
    for op, name in ((flags(SEEN, 0, [(7, 7)]), "flags"),
                     (keyword_add("a", [(7, 7)]), "keyword_add"),
                     (keyword_remove("a", [(7, 7)]), "keyword_remove"),
                     (keyword_reset([(7, 7)]), "keyword_reset"),
                     (expunge([(7, 7)]), "expunge"),
                     (exists([(7, 7)]), "exists"),
                     (attribute_op("a", "b"), "attribute")):
        bad("MESSAGES have no op but APPEND: " + name,
            mailbox([append(inline=BODY), op], flags=MESSAGES, **zero),
            "mailbox change: %s 2: type" % name)
    bad("SNAPSHOT with a position before", mailbox(flags=SNAPSHOT),
        "mailbox change: from")
    bad("SNAPSHOT whose first op is not EXISTS",
        mailbox([append(inline=BODY)], flags=SNAPSHOT, frm=(0, 0, 0)),
        "mailbox change: append 1: type")
    bad("SNAPSHOT with a second EXISTS",
        mailbox([exists([(1, 1)]), exists([(2, 2)])], flags=SNAPSHOT,
                frm=(0, 0, 0)), "mailbox change: exists 2: type")
    bad("EXISTS outside of a SNAPSHOT", mailbox([exists([(1, 1)])]),
        "mailbox change: exists 1: type")
    bad("ATTRIBUTES are a SNAPSHOT's", mailbox(flags=ATTRIBUTES),
        "mailbox change: flags")
    bad("ATTRIBUTES do not go with MORE",
        mailbox([exists([])], flags=SNAPSHOT | MORE | ATTRIBUTES,
                frm=(0, 0, 0)), "mailbox change: flags")
    bad("ATTRIBUTES do not go with MESSAGES",
        mailbox(flags=MESSAGES | ATTRIBUTES, **zero), "mailbox change: flags")
    bad("op of type 0", box(b"\x00"), "mailbox change: op 1: type")
    bad("op of a newer version", box(b"\x09"), "mailbox change: op 1: type")
    bad("APPEND of uid 0", mailbox([append(uid=0, inline=BODY)]),
        "append 1: uid")
    bad("APPEND of a uid of 33 bits", mailbox([append(uid=2**32, inline=BODY)]),
        "append 1: uid")
    bad("APPEND: uid not in its shortest form",
        box(b"\x01\x87\x00" + app[2:]), "append 1: uid")
    bad("APPEND: GUID with a NUL", mailbox([append(guid="a\0", inline=BODY)]),
        "append 1: guid")
    bad("APPEND: \\Recent does not travel",
        mailbox([append(flags=0x20, inline=BODY)]), "append 1: flags")
    bad("APPEND: empty keyword", mailbox([append(keywords=[""], inline=BODY)]),
        "append 1: keywords")
    bad("APPEND: more keywords than bytes left",
        box(b"\x01\x07\x01g\x00" + num(2**32 - 1) + b"\x01a"),
        "append 1: keywords")
    bad("APPEND: date of 65 bits",
        box(b"\x01\x07\x01g\x00\x00" + b"\xff" * 9 + b"\x03"),
        "append 1: received_date")
    bad("APPEND: body source of a newer version",
        mailbox([append(inline=BODY)])[0][:-len(BODY) - 1] + b"\x03" + BODY,
        "append 1: source")
    bad("APPEND: body INLINE cut off",
        mailbox([append(inline=BODY[:-1])]), "append 1: body")
    bad("APPEND: what follows the body is the next op",
        mailbox([append(inline=BODY + b"\x00")]), "op 2: type")
    bad("APPEND: body COPY of uid 0", mailbox([append(copy=(GUID_B, 0))]),
        "append 1: copy_uid")
    bad("APPEND: body COPY cut off in the GUID",
        mailbox([append(copy=(GUID_B, 3))])[0][:-2],
        "append 1: copy_mailbox_guid")
    bad("APPEND: body SPOOL cut off",
        mailbox([append(spool=SPOOL_ID)])[0][:-1], "append 1: spool_id")
    bad("FLAGS: internal bit added", mailbox([flags(0x40, 0, [(1, 1)])]),
        "flags 1: add_flags")
    bad("FLAGS: \\Recent removed", mailbox([flags(0, 0x20, [(1, 1)])]),
        "flags 1: remove_flags")
    bad("FLAGS of no uids", mailbox([flags(SEEN, 0, [])]), "flags 1: uids")
    bad("FLAGS of a uid past the last",
        box(b"\x02\x08\x00" + num(1) + num(2**32 - 1) + num(0)),
        "flags 1: uids")
    bad("KEYWORD_ADD of an empty keyword", mailbox([keyword_add("", [(1, 1)])]),
        "keyword_add 1: keyword")
    bad("KEYWORD_REMOVE of no uids", mailbox([keyword_remove("a", [])]),
        "keyword_remove 1: uids")
    bad("KEYWORD_RESET: uids cut off", box(b"\x05\x01\x00"),
        "keyword_reset 1: uids")
    bad("EXPUNGE: more ranges than bytes", box(b"\x06\x02\x00\x00\x00"),
        "expunge 1: uids")
    bad("ATTRIBUTE without a key", mailbox([attribute_op("", "v")]),
        "attribute 1: attribute key")
    bad("ATTRIBUTE: key too long", mailbox([attribute_op("k" * 1001, "v")]),
        "attribute 1: attribute key")
    bad("ATTRIBUTE: key with a NUL", mailbox([attribute_op("a\0b", "v")]),
        "attribute 1: attribute key")
    bad("ATTRIBUTE: value with a NUL", mailbox([attribute_op("a", "\0")]),
        "attribute 1: attribute value")
    bad("ATTRIBUTE: unknown flag", box(b"\x08\x04\x01a"),
        "attribute 1: attribute flags")
    bad("ATTRIBUTE: value cut off", box(b"\x08\x02\x01a\x02b"),
        "attribute 1: attribute value")
    data = mailbox([attribute_op("k", "v" * 65537)])[0]
    f.bad("ATTRIBUTE: value too large", "change",
          data[:-65537].hex() + " 76*65537", "attribute 1: attribute value")
    bad("the second op is named by its number",
        mailbox([expunge([(1, 1)]), expunge([])]), "expunge 2: uids")
    bad("LIST: action 0", list_(0), "list change: action")
    bad("LIST: action of a newer version", list_(8), "list change: action")
    bad("LIST CREATE without GUID", list_(CREATE, uid_validity=1, uid_next=1),
        "list change: guid")
    bad("LIST CREATE_DIR with a GUID", list_(CREATE_DIR, GUID_A),
        "list change: guid")
    bad("LIST SUBSCRIBE with a GUID", list_(SUBSCRIBE, GUID_A),
        "list change: guid")
    bad("LIST DELETE without name", list_(DELETE, GUID_A, ""),
        "list change: name")
    bad("LIST RENAME without new name", list_(RENAME, GUID_A),
        "list change: new_name")
    bad("LIST DELETE with a new name", list_(DELETE, GUID_A, "a", "b"),
        "list change: new_name")
    bad("LIST DELETE with a UIDVALIDITY", list_(DELETE, GUID_A, uid_validity=1),
        "list change: uid_validity")
    bad("LIST DELETE with a UIDNEXT", list_(DELETE, GUID_A, uid_next=1),
        "list change: uid_validity")
    bad("LIST with a byte left over", list_(SUBSCRIBE)[0] + b"\x00",
        "list change: end")
    bad("TREE: more mailboxes than bytes left",
        head(3, "u") + num(2**32 - 1), "tree change: mailboxes")
    bad("TREE: mailbox without name", tree([(GUID_A, "", 1, 1)], []),
        "tree change: mailbox name")
    bad("TREE: more subscriptions than bytes left",
        head(3, "u") + num(0) + num(2**64 - 1), "tree change: subscriptions")
    bad("TREE: subscription cut off", tree([], ["INBOX"])[0][:-4],
        "tree change: subscription")
    bad("TREE: more deleted than bytes left",
        head(3, "u") + num(0) + num(0) + num(1) + bytes(15),
        "tree change: deleted")
    bad("TREE without number", tree([], [])[0][:-2], "tree change: number")
    bad("TREE: number of 33 bits", tree([], [], number=2**32),
        "tree change: number")
    bad("TREE without flags", tree([], [], number=1)[0][:-1],
        "tree change: flags")
    bad("TREE: unknown flag", tree([], [], number=1, flags=8),
        "tree change: flags has unknown bits")
    for flag in (DEEP, EXPLAIN, REPAIR):
        bad("TREE: flags for nobody", tree([], [], flags=flag),
            "tree change: flags are given without number")
    bad("TREE with a byte left over", tree([], [])[0] + b"\x00",
        "tree change: end")
    bad("REQUEST with a name and no GUID", request(NO_GUID, "INBOX"),
        "request: name")
    bad("REQUEST cut off", request()[0][:-2], "request: uid_next")
    bad("REQUEST cut off before its uids", request()[0][:-1], "request: uids")
    bad("REQUEST with uids cut off",
        request(uid_next=0, ranges=[(1, 7)])[0][:-1], "request: uids")
    bad("REQUEST with more uids than bytes",
        request(uid_next=0)[0][:-1] + num(2**32) + num(0) * 2,
        "request: uids")
    bad("REQUEST with a uid past the last",
        request(uid_next=0)[0][:-1] + num(1) + num(2**32 - 1) + num(0),
        "request: uids")
    bad("REQUEST for single messages, and what follows",
        request(uid_next=1, ranges=[(1, 1)]), "request: uids")
    bad("REQUEST for single messages of no mailbox",
        request(NO_GUID, "", 0, [(1, 1)]), "request: uids")
    bad("REQUEST with a byte left over",
        request(uid_next=0, ranges=[(1, 1)])[0] + b"\x00", "request: end")
    bad("SHARD_REQUEST with a user", shard_change(SHARD_REQUEST, user="u"),
        "shard change: user")
    bad("SHARD_REQUEST without a node", shard_change(SHARD_REQUEST, node=""),
        "shard change: node")
    bad("SHARD_SWEPT: a node of a wrong name",
        shard_change(SHARD_SWEPT, node="a/b"), "shard change: node")
    bad("SHARD_SWEPT: number of 33 bits",
        shard_change(SHARD_SWEPT, number=2**32), "shard change: number")
    bad("SHARD_SWEPT cut off", shard_change(SHARD_SWEPT)[0][:-1],
        "shard change: number")
    bad("SHARD_SWEPT with a byte left over",
        shard_change(SHARD_SWEPT)[0] + b"\x00", "shard change: end")
    bad_verify(bad)
    bad_verified(f, bad)
    bad_compare(f, bad)
    bad_compared(f, bad)
    bad("SPOOL without data", spool(b""), "spool chunk: data")
    bad("SPOOL cut off in its id", spool(b"")[0][:-5], "spool chunk: id")
    bad("SPOOL: data past the end of numbers", spool(b"ab", 2**64 - 2),
        "spool chunk: offset")
    f.bad("SPOOL, one byte too large", "change",
          spool(b"")[0].hex() + " 61*131073", "spool chunk: data")
    f.bad("APPEND, body INLINE one byte too large", "change",
          mailbox([append(inline=b"", size=65537)])[0].hex() + " 61*65537",
          "append 1: body")
    data, _ = request(name="a" * (4 * 1024 * 1024 - 28))
    assert len(data) == 4 * 1024 * 1024 + 1
    f.bad("one byte more than the largest change", "change",
          data[:27].hex() + " 61*%d 08 00" % (4 * 1024 * 1024 - 28),
          "change: size")
    return f


A, A_OLD, B, C, X = (Node("a"), Node("a", "a before"), Node("b"), Node("c"),
                     Node("x"))


def make_keys():
    lines = [
        "# Made by make-vectors.py; do not edit.",
        "#",
        "# The keys of entries.txt. Line N stands in file FILE:  FILE: LINE",
        "# All nodes know each other but for x, whom nobody knows. Node a has",
        "# changed its key: the second line of a.pub is its old one."]
    for node in (A, B, C, X):
        lines.append("%s.key: %s" % (node.name, node.secret_line()))
        lines.append("%s.pub: %s" % (node.name, node.public_line()))
        if node is A:
            lines.append("a.pub: " + A_OLD.public_line())
    return "\n".join(lines) + "\n"


def group(*changes):
    """The payload of a log entry"""
    return b"".join(num(len(c[0])) + c[0] for c in changes)


PAYLOAD = group(heartbeat())


def place(reader="b", origin="a", kind=1, shard=0, chain=None):
    return "open by=%s kind=%d origin=%s shard=%d chain=%s" % (
        reader, kind, origin, shard, chain.text if chain else "-")


def make_entries():
    f = File("""\
Entries, accepted. The keys are in keys.txt.
  open by=NODE kind=KIND origin=NODE shard=SHARD chain=CHAIN BYTES
what NODE makes of an entry in a place where entries of KIND, origin (-: any
peer) and SHARD stand, when it has read up to CHAIN:
EPOCH/GENERATION-SEQ/HASH or - for none.
  own by=NODE BYTES
what NODE makes of an entry at the end of its own stream.""")

    e = Entry(A, [B], PAYLOAD)
    f.ok("one recipient", place(), e.bytes, e.text())
    f.ok("a reader that has nothing yet sees no gap",
         place(chain=Chain(0, 0, 0, bytes(32))), e.bytes, e.text())
    f.ok("any peer's", place(origin="-"), e.bytes, e.text())
    f.ok("our own", "own by=a", e.bytes,
         e.text().replace(qdata(PAYLOAD), "-"))
    f.ok("empty payload", place(), Entry(A, [B], b"", seq=2).bytes,
         Entry(A, [B], b"", seq=2).text())
    for size in (1, 15, 16, 17, 63, 64, 65, 1000):
        e = Entry(A, [B], bytes(i & 0xff for i in range(size)), seq=size)
        f.ok("payload of %d bytes, around the ciphers' blocks" % size,
             place(), e.bytes, e.text())
    e = Entry(A, [B], group(mailbox([append(inline=BODY)]), list_(SUBSCRIBE)),
              seq=3)
    f.ok("a group of two changes", place(), e.bytes, e.text())
    e = Entry(A, [C, X, B], PAYLOAD)
    f.ok("three recipients, the third", place("b"), e.bytes, e.text())
    f.ok("three recipients, the first", place("c"), e.bytes, e.text())
    f.ok("three recipients, one whom the reader does not know", place("x"),
         e.bytes, e.text())
    e = Entry(A, [B], PAYLOAD, shard=254, shards=255, epoch=2**64 - 1,
              generation=2**64 - 1, seq=2**64 - 1, time=2**64 - 1,
              prev=b"\xff" * 32)
    f.ok("the largest numbers", place(shard=254), e.bytes, e.text())
    e = Entry(B, [A], PAYLOAD)
    f.ok("from b to a", place("a", "b"), e.bytes, e.text())
    e = Entry(A_OLD, [B], PAYLOAD)
    f.ok("signed with the origin's old key", place(), e.bytes, e.text())
    f.ok("our own, signed with our old key", "own by=a", e.bytes,
         e.text().replace(qdata(PAYLOAD), "-"))

    e1 = Entry(A, [B], PAYLOAD, seq=1)
    e2 = Entry(A, [B], PAYLOAD, seq=2, prev=e1.hash)
    e3 = Entry(A, [B], PAYLOAD, seq=3, prev=e2.hash)
    e4 = Entry(A, [B], PAYLOAD, generation=101, seq=1, prev=e3.hash)
    e5 = Entry(A, [B], PAYLOAD, generation=101, seq=2, epoch=2, prev=e4.hash)
    f.ok("a chain: the first", place(), e1.bytes, e1.text())
    f.ok("a chain: the second", place(chain=e1.chain()), e2.bytes, e2.text())
    f.ok("a chain: the third", place(chain=e2.chain()), e3.bytes, e3.text())
    f.ok("the chain goes on over the border of a generation",
         place(chain=e3.chain()), e4.bytes, e4.text())
    f.ok("the epoch may grow within a generation", place(chain=e4.chain()),
         e5.bytes, e5.text())
    f.ok("a gap: the second is missing", place(chain=e1.chain()), e3.bytes,
         e3.text(True))
    f.ok("a gap: the end of a generation is missing", place(chain=e2.chain()),
         e4.bytes, e4.text(True))
    other = Chain(1, 100, 1, blake2b(b"another history"))
    f.ok("a gap: the number follows, the hash does not", place(chain=other),
         e2.bytes, e2.text(True))
    e = Entry(A, [B], PAYLOAD, generation=102, seq=1)
    f.ok("a gap: the origin does not know the entry before",
         place(chain=e3.chain()), e.bytes, e.text(True))
    f.ok("a gap: the same, and the reader's hash is zero",
         place(chain=Chain(1, 100, 3, bytes(32))), e.bytes, e.text(True))

    data, _ = ack()
    e = Entry(B, [A], data, kind=2, shard=3, seq=1)
    f.ok("ack: any shard, and no chain",
         place("a", "-", 2, 0, Chain(9, 999, 9, bytes(32))), e.bytes, e.text())
    e = Entry(B, [A], data, kind=2, generation=0, seq=0)
    f.ok("ack: needs no number", place("a", "b", 2), e.bytes, e.text())
    e = Entry(B, [A_OLD, A], data, kind=2)
    f.ok("ack: for all keys of its reader", place("a", "b", 2), e.bytes,
         e.text())
    f.ok("ack: what is for another key is that one's to check",
         place("a", "b", 2), flip(e.bytes, len(e.bytes) - 33),
         e.text())
    return f


def flip(data, pos):
    out = bytearray(data)
    out[pos] ^= 1
    return bytes(out)


def setter(pos, value):
    def patch(data):
        data[pos:pos + len(value)] = value
    return patch


def make_refused_entries():
    f = File("""\
Entries, refused. As entries.txt; after the ! stands the name of the outcome
(dovetail_open_ret_name()).""")
    good = Entry(A, [B], PAYLOAD, seq=5, prev=b"\x11" * 32)
    e = good.bytes

    def bad(rule, data, words, **kw):
        f.bad(rule, place(**kw), data, words)

    # damage on the way: what is not signed
    for pos, name, words in (
            (0, "magic", "malformed"), (5, "kind", "malformed"),
            (6, "shard", "bad-signature"), (7, "shards", "bad-signature"),
            (8, "epoch", "bad-signature"), (15, "epoch", "bad-signature"),
            (16, "generation", "bad-signature"),
            (23, "generation", "bad-signature"),
            (24, "seq", "bad-signature"), (31, "seq", "bad-signature"),
            (32, "time", "bad-signature"), (39, "time", "bad-signature"),
            (40, "key id", "unknown-key"), (47, "key id", "unknown-key"),
            (48, "prev", "bad-signature"), (79, "prev", "bad-signature"),
            (80, "number of recipients", "malformed"),
            (81, "recipient's key id", "bad-signature"),
            (89, "wrapped key", "bad-signature"),
            (136, "wrapped key", "bad-signature"),
            (137, "nonce", "bad-signature"), (160, "nonce", "bad-signature"),
            (161, "size of the ciphertext", "malformed"),
            (164, "size of the ciphertext", "malformed"),
            (165, "ciphertext", "bad-signature"),
            (len(e) - 65, "tag of the ciphertext", "bad-signature"),
            (len(e) - 64, "signature, first half", "bad-signature"),
            (len(e) - 32, "signature, second half", "bad-signature")):
        bad("flipped bit: %s, byte %d" % (name, pos), flip(e, pos), words)
    bad("kind changed from log to ack", e[:5] + b"\x02" + e[6:], "malformed")
    bad("kind changed from log to ack, and its size", e[:5] + b"\x02" + e[6:-32],
        "bad-signature")
    bad("nothing", b"", "malformed")
    bad("only the magic", e[:4], "malformed")
    bad("cut off in the header", e[:60], "malformed")
    bad("cut off in a recipient", e[:100], "malformed")
    bad("cut off in the nonce", e[:150], "malformed")
    bad("cut off in the ciphertext", e[:170], "malformed")
    bad("cut off in the signature", e[:-1], "malformed")
    bad("trailing byte", e + b"\x00", "malformed")
    bad("two entries in one", e + e, "malformed")
    bad("not an entry at all", b"hello world, this is not an entry" * 8,
        "malformed")
    bad("signature of another entry",
        e[:-64] + Entry(A, [B], PAYLOAD, seq=6).bytes[-64:], "bad-signature")
    # S + L: verifies in lenient implementations
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(e[-32:], "little") + order
    bad("signature whose S is not reduced",
        e[:-32] + s.to_bytes(32, "little"), "bad-signature")
    bad("zero signature", e[:-64] + bytes(64), "bad-signature")

    f.bad("the largest size is read (and here finds no entry)", place(),
          "4456544c01 00*%d" % (5 * 1024 * 1024 - 5), "malformed")
    f.bad("one byte more is refused unread", place(),
          "4456544c01 00*%d" % (5 * 1024 * 1024 - 4), "oversized")

    # signed, but wrong
    def sealed(rule, words, where=None, **kw):
        kw.setdefault("seq", 5)
        bad(rule, Entry(kw.pop("origin", A), kw.pop("recipients", [B]),
                        kw.pop("payload", PAYLOAD), **kw).bytes, words,
            **(where or {}))

    sealed("version 0", "malformed", patch=setter(4, b"\x00"))
    sealed("future version", "version", patch=setter(4, b"\x02"))
    bad("future version, whose structure nobody knows yet",
        b"DVTL\x02 whatever", "version")
    sealed("kind 0", "malformed", kind=0)
    sealed("future kind", "malformed", kind=3)
    sealed("no shards", "malformed", shard=0, shards=0)
    sealed("shard past the last", "malformed", shard=4)
    sealed("log entry without number", "malformed", seq=0)
    sealed("no recipients", "malformed", recipients=[])
    sealed("65 recipients", "malformed", recipients=[B] * 65)
    sealed("ciphertext smaller than its tag", "malformed",
           patch_signed=lambda d: (
               d.__setitem__(slice(161, 165), b"\0\0\0\x0f"),
               d.__delitem__(slice(180, None))))
    sealed("origin nobody knows", "unknown-key", origin=X)
    sealed("origin nobody knows, any peer's place", "unknown-key", origin=X,
           where={"origin": "-"})
    sealed("stranger under a peer's key id", "bad-signature", origin=X,
           key_id=A.id)
    sealed("peer under another peer's key id", "bad-signature", origin=C,
           key_id=A.id)
    sealed("old key under the new key's id", "bad-signature", origin=A_OLD,
           key_id=A.id)
    sealed("peer in another peer's stream", "wrong-origin", origin=C)
    bad("our own entry, sent back to us", e, "wrong-origin", reader="a",
        origin="b")
    bad("our own entry, where any peer's may stand", e, "wrong-origin",
        reader="a", origin="-")
    bad("sealed for another node", e, "not-for-us", reader="c")
    sealed("sealed for two others", "not-for-us",
           recipients=[C, X])
    sealed("wrapped key is wrong", "undecryptable",
           patch=setter(90, b"\x00\x00"))
    sealed("wrapped for somebody else", "undecryptable",
           patch=lambda d: d.__setitem__(
               slice(81, 137), B.id + Entry(A, [C], PAYLOAD).bytes[89:137]))
    sealed("header of another entry around the ciphertext", "undecryptable",
           patch_signed=setter(8, struct.pack(">Q", 2)))
    sealed("ciphertext is wrong", "undecryptable",
           patch_signed=lambda d: d.__setitem__(165, d[165] ^ 1))
    sealed("tag is wrong", "undecryptable",
           patch_signed=lambda d: d.__setitem__(-1, d[-1] ^ 1))
    sealed("another shard's", "wrong-stream", shard=1)
    bad("log entry where acks stand", e, "wrong-stream", kind=2)
    sealed("ack where log entries stand", "wrong-stream", kind=2)
    bad("the same again", e, "repeated", chain=good.chain())
    bad("an older one of the generation", e, "repeated",
        chain=Chain(1, 100, 6, bytes(32)))
    bad("one of an older generation", e, "repeated",
        chain=Chain(1, 101, 1, bytes(32)))
    sealed("one of an older generation, although of a newer epoch",
           "repeated", epoch=2, where={"chain": Chain(1, 101, 1, bytes(32))})
    bad("epoch that is over", e, "stale-epoch",
        chain=Chain(2, 100, 4, b"\x11" * 32))
    bad("epoch that is over, at the start of a chain", e, "stale-epoch",
        chain=Chain(2, 0, 0, bytes(32)))
    bad("old and of an old epoch is just repeated", e, "repeated",
        chain=Chain(2, 100, 5, bytes(32)))

    # acks: keyed with the secret that both ends share
    where = {"reader": "a", "origin": "b", "kind": 2}
    good = Entry(B, [A], ack()[0], kind=2)
    e = good.bytes
    for pos, name, words in (
            (5, "kind", "malformed"), (6, "shard", "bad-signature"),
            (32, "time", "bad-signature"), (40, "key id", "unknown-key"),
            (81, "recipient's key id", "not-for-us"),
            (89, "wrapped key", "bad-signature"),
            (137, "nonce", "bad-signature"),
            (165, "ciphertext", "bad-signature"),
            (len(e) - 32, "signature", "bad-signature"),
            (len(e) - 1, "signature", "bad-signature")):
        bad("ack: flipped bit: %s, byte %d" % (name, pos), flip(e, pos),
            words, **where)
    bad("ack: cut off in the signature", e[:-1], "malformed", **where)
    bad("ack: trailing byte", e + b"\0", "malformed", **where)
    bad("ack: the signature that a log entry has",
        e[:-32] + B.sign.sign(good.hash), "malformed", **where)
    bad("ack: hash without a key", e[:-32] + blake2b(good.hash),
        "bad-signature", **where)
    for signer, name in ((X, "a stranger"), (C, "another peer")):
        sealed("ack: of %s under a peer's key id" % name, "bad-signature",
               where, origin=B, recipients=[A], payload=ack()[0], kind=2,
               signer=signer)
    sealed("ack: for another key of its reader only", "not-for-us", where,
           origin=B, recipients=[A_OLD], payload=ack()[0], kind=2)
    sealed("ack: the reader's own, whose secret is the same", "wrong-origin",
           where, origin=A, recipients=[B], payload=ack()[0], kind=2)
    sealed("ack: ... under the key id of the other end", "not-for-us",
           where, origin=A, recipients=[B], payload=ack()[0], kind=2,
           patch=setter(40, B.id))
    e = Entry(A, [B], PAYLOAD, seq=5, prev=b"\x11" * 32).bytes

    f.bad("our stream's end: somebody else's entry", "own by=b", e, "not ours")
    f.bad("our stream's end: a stranger's entry", "own by=a",
          Entry(X, [A], PAYLOAD).bytes, "not ours")
    f.bad("our stream's end: an ack of ours", "own by=a",
          Entry(A, [B], ack()[0], kind=2).bytes, "not ours")
    f.bad("our stream's end: changed", "own by=a", flip(e, 170), "signature")
    f.bad("our stream's end: cut off", "own by=a", e[:-1], "cut off")
    return f


def make_digests():
    f = File("""\
Digests; see dovetail-digest.h. All outcomes are 16 bytes, BYTES are
  message    the body, which may come in any pieces
  keywords   a message's keywords, each ended by 00
  element    keywords and message
  sum        numbers, to be added""")

    def message(rule, body, guid=GUID_A, received=1700000000):
        f.ok(rule, "message guid=%s received_date=%d" % (guid.hex(), received),
             body, message_hash(guid, received, body).hex())

    message("an empty body", b"")
    message("LF stays LF", b"Subject: a\n\nbody\n")
    message("CRLF counts as LF: the same hash", b"Subject: a\r\n\r\nbody\r\n")
    message("and where only some are CRLF", b"Subject: a\r\n\nbody\r\n")
    message("another body", b"Subject: b\n\nbody\n")
    message("another GUID", b"Subject: a\n\nbody\n", GUID_B)
    message("another date", b"Subject: a\n\nbody\n", received=1700000001)
    message("dates before 1970 are negative", b"\n", received=-1)
    message("the first date", b"\n", received=-2**63)
    message("the last date", b"\n", received=2**63 - 1)
    for body in (b"\r", b"\n", b"\r\n", b"\n\r", b"\r\r", b"\r\r\n",
                 b"\r\r\r\n", b"\r\n\r", b"\r\n\r\n", b"a\rb", b"a\r\nb\r",
                 b"a\r\r\nb"):
        message("a CR goes only at a LF", body)
    message("bytes of all values", bytes(range(256)))
    message("more than one block of BLAKE2b",
            b"".join(b"line %d\r\n" % i for i in range(100)))

    def keywords(rule, *names):
        f.ok(rule, "keywords", b"".join(n.encode() + b"\0" for n in names),
             keyword_sum(names).hex())

    keywords("no keywords")
    keywords("one keyword", "$label1")
    keywords("its case does not count", "$LaBeL1")
    keywords("only A to Z have a case", "ÄÖÜ@[ÁX")
    keywords("several", "$Forwarded", "NonJunk", "work")
    keywords("in another order", "work", "NonJunk", "$Forwarded")
    keywords("as many as make the sum carry", *("k%d" % i for i in range(20)))

    def el(rule, key, uid, flags_, kw, message_):
        f.ok(rule, "element key=%s uid=%d flags=%d" % (key.hex(), uid, flags_),
             kw + message_, element(key, uid, flags_, kw, message_).hex())

    el("nothing but zeros", bytes(16), 1, 0, bytes(16), bytes(16))
    el("one of each", KEY, 7, SEEN, SUM, HASH)
    el("another key", KEY[::-1], 7, SEEN, SUM, HASH)
    el("another uid", KEY, 8, SEEN, SUM, HASH)
    el("other flags", KEY, 7, SEEN | FLAGGED, SUM, HASH)
    el("other keywords", KEY, 7, SEEN, SUM[::-1], HASH)
    el("another message", KEY, 7, SEEN, SUM, HASH[::-1])
    el("the last uid, all flags", KEY, 2**32 - 1, 0x1f, SUM, HASH)
    el("uid's bytes", KEY, 0x01020304, 0x1f, SUM, HASH)

    def total(rule, *numbers):
        numbers = [n if isinstance(n, bytes) else n.to_bytes(16, "little")
                   for n in numbers]
        f.ok(rule, "sum", b"".join(numbers), add_128(numbers).hex())

    total("of nothing")
    total("little-endian", SUM)
    total("a carry from byte to byte", 0xff, 1)
    total("a carry between the halves", 2**64 - 1, 1)
    total("both halves full", 2**64 - 1, 2**64 - 1)
    total("modulo 2^128", 2**128 - 1, 1)
    total("twice the largest", 2**128 - 1, 2**128 - 1)
    total("a carry that comes and goes", 2**127, 2**127, 2**64 - 1, 2**64 - 1)
    total("a mailbox: its elements",
          *(element(KEY, uid, uid % 32, short_sum(["k%d" % uid]),
                    message_hash(GUID_A, uid, b"body %d\n" % uid))
            for uid in range(1, 21)))
    return f


def make_acks():
    f = File("The payload of acks.")
    f.ok("nothing yet", "ack", *ack(0, 0, 0, 0))
    f.ok("all is well", "ack", *ack())
    f.ok("with failures", "ack", *ack(
        100, 7, 1700000000123456, 12, 1, 2, [(100, 3, 0), (100, 6, 300)],
        "Mailbox is locked"))
    f.ok("the largest numbers", "ack", *ack(
        2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**32 - 1,
        [(2**64 - 1, 2**64 - 1, 2**32 - 1)]))
    f.ok("256 failures", "ack", *ack(failed=[(1, 1, 1)] * 256))
    f.ok("with troubles, which are not looked into", "ack",
         *ack(troubles=b"\x00\xff\x01"))
    f.bad("troubles that are cut off", "ack",
          ack(troubles=b"\x00\xff\x01")[0][:-1], "cut off")
    f.bad("bytes behind the troubles", "ack",
          ack(troubles=b"\x00")[0] + b"\x00", "more bytes")
    f.bad("257 failures", "ack", ack(failed=[(1, 1, 1)] * 257)[0], "too many")
    f.bad("claims failures that are not there", "ack",
          ack()[0][:-2] + num(200), "cut off")
    f.bad("nothing", "ack", b"", "cut off")
    f.bad("cut off", "ack", ack()[0][:-1], "cut off")
    f.bad("trailing byte", "ack", ack()[0] + b"\x00", "more bytes")
    f.bad("set_aside of 33 bits", "ack", ack(set_aside=2**32)[0], "cut off")
    f.bad("ordinal of 33 bits", "ack", ack(failed=[(1, 1, 2**32)])[0],
          "cut off")
    f.bad("seq not in its shortest form", "ack", b"\x01\x82\x00" + ack()[0][2:],
          "malformed")
    f.bad("last_error with a NUL", "ack", ack(last_error="a\0b")[0],
          "malformed")
    return f


def main():
    directory = sys.argv[1] if len(sys.argv) > 1 else \
        os.path.dirname(os.path.abspath(__file__))
    selftest()
    with open(os.path.join(directory, "keys.txt"), "w",
              encoding="utf-8") as keys:
        keys.write(make_keys())
    for name, make in (("primitives", make_primitives),
                       ("changes", make_changes),
                       ("changes-refused", make_refused_changes),
                       ("entries", make_entries),
                       ("entries-refused", make_refused_entries),
                       ("acks", make_acks),
                       ("digests", make_digests)):
        make().write(os.path.join(directory, name + ".txt"))


if __name__ == "__main__":
    main()
