"""TLS to Redis, against a real one: with the right files it works, with the
wrong ones it says why and sends nothing, and mail flows all the same."""

import os
import re
import socket
import subprocess
import threading

import pytest

from cluster import mail, wait_for

SETTINGS = {"dovetail_ack_timeout": "1s"}


def openssl(*args):
    subprocess.run(["openssl", *args], check=True, capture_output=True)


class Authority:
    """A certificate authority in a directory, with certificates of its own."""

    def __init__(self, directory, name):
        self.dir, self.name = str(directory), name
        self.certificate, self.key = self.path("ca.pem"), self.path("ca.key")
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt",
                "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
                "-subj", "/CN=" + name, "-keyout", self.key,
                "-out", self.certificate)

    def path(self, name):
        return os.path.join(self.dir, self.name + "-" + name)

    def sign(self, name, alternative="DNS:localhost", days=("-days", "30")):
        """Paths of a certificate and its key, which Redis may read."""
        certificate, key = self.path(name + ".pem"), self.path(name + ".key")
        request, extension = self.path("req"), self.path("ext")
        with open(extension, "w") as f:
            f.write("subjectAltName=%s\n" % alternative)
        openssl("req", "-newkey", "ec", "-pkeyopt",
                "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=" + name,
                "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.certificate,
                "-CAkey", self.key, "-CAcreateserial", *days,
                "-extfile", extension, "-out", certificate)
        return certificate, key


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"), "right")


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"), "other")


def server(authority, files, clients="no"):
    """Settings of a Redis with these files."""
    return {"cert-file": files[0], "key-file": files[1],
            "ca-cert-file": authority.certificate, "auth-clients": clients}


def start(new_cluster, tls, ca_file, redis=(), **settings):
    settings = dict(SETTINGS, dovetail_redis_ca_file=ca_file, **{
        "dovetail_redis_" + name: path for name, path in settings.items()})
    return new_cluster(redis=dict(redis, tls=tls), settings={
        name: value for name, value in settings.items() if value})


def replicates(cluster):
    user = cluster.user()
    user.lmtp(mail("small"))
    # more than one TLS record, and than the buffers between
    user.lmtp(mail("large", 3000000))
    with user.imap() as session:
        session.select()
        session.do("STORE", "1", "+FLAGS (\\Flagged)")
    user.wait_equal()


@pytest.mark.parametrize("redis", [
    {}, {"password": "s3 cret"},
    {"username": "dt", "password": "s3cret", "db": 3, "prefix": "x:"}],
    ids=["plain", "password", "user"])
def test_tls(new_cluster, ca, redis):
    replicates(start(new_cluster, server(ca, ca.sign("server")),
                     ca.certificate, redis))


def test_address_as_name(new_cluster, ca):
    tls = server(ca, ca.sign("address", "IP:127.0.0.1"))
    cluster = new_cluster(redis={"tls": tls}, start=False, settings=dict(
        SETTINGS, dovetail_redis_ca_file=ca.certificate))
    for node in cluster.nodes:
        node.settings["dovetail_redis"] = cluster.redis.url.replace(
            "localhost", "127.0.0.1")
        node.write_conf()
    cluster.start()
    replicates(cluster)


def test_client_certificate(new_cluster, ca):
    certificate, key = ca.sign("client")
    replicates(start(new_cluster, server(ca, ca.sign("server"), "yes"),
                     ca.certificate, cert_file=certificate, key_file=key))


def fails(cluster, reason):
    """Says why on both sides, keeps mail flowing, and sends nothing."""
    cluster.expect_errors("redis")
    user = cluster.user()
    user.lmtp(mail("not sent"))
    for node in cluster.nodes:
        node.wait_log("Error: redis.*" + reason)
    assert len(user.look(node=cluster.a)) == 1
    assert not cluster.redis.keys()
    assert re.search("TLS failed|closed", cluster.a.doveadm("dovetail",
                                                            "status"))
    return user


@pytest.mark.parametrize("clients", ["yes", "no"])
def test_unknown_authority(new_cluster, ca, other_ca, clients):
    cluster = start(new_cluster, server(ca, ca.sign("server"), clients),
                    other_ca.certificate)
    user = fails(cluster, "TLS failed: .*certificate.*"
                 r"check dovetail_redis_ca_file")
    if clients == "no":
        for node in cluster.nodes:
            node.settings["dovetail_redis_ca_file"] = ca.certificate
            node.write_conf()
            node.reload()
        user.wait_equal()


def test_the_system_does_not_know_the_authority(new_cluster, ca):
    fails(start(new_cluster, server(ca, ca.sign("server")), ""),
          "TLS failed: .*certificate")


def test_expired_certificate(new_cluster, ca):
    files = ca.sign("expired", days=("-not_before", "20200101000000Z",
                                     "-not_after", "20200201000000Z")
                    if "not_before" in subprocess.run(
                        ["openssl", "x509", "-help"], capture_output=True,
                        text=True).stderr else ("-days", "-1"))
    fails(start(new_cluster, server(ca, files), ca.certificate),
          "TLS failed: .*expired")


def test_wrong_name(new_cluster, ca):
    files = ca.sign("elsewhere", "DNS:redis.example.net")
    fails(start(new_cluster, server(ca, files), ca.certificate),
          "TLS failed: .*localhost")


def test_client_certificate_missing(new_cluster, ca):
    fails(start(new_cluster, server(ca, ca.sign("server"), "yes"),
                ca.certificate), "TLS failed: .*certificate")


def test_client_certificate_of_a_stranger(new_cluster, ca, other_ca):
    certificate, key = other_ca.sign("client")
    fails(start(new_cluster, server(ca, ca.sign("server"), "yes"),
                ca.certificate, cert_file=certificate, key_file=key),
          "TLS failed: .*(unknown ca|certificate)")


def test_wrong_password(new_cluster, ca):
    cluster = new_cluster(
        redis={"tls": server(ca, ca.sign("server")), "password": "right"},
        start=False, settings=dict(
            SETTINGS, dovetail_redis_ca_file=ca.certificate))
    for node in cluster.nodes:
        with open(os.path.join(node.key_dir, "redis.password"), "w") as f:
            f.write("wrong\n")
    cluster.expect_errors("redis")
    cluster.start()
    for node in cluster.nodes:
        node.wait_log("Error: redis.*AUTH failed: WRONGPASS")


@pytest.mark.parametrize("setting,content,reason", [
    ("ca_file", None, "No such file"),
    ("ca_file", "nonsense", "is not a PEM file"),
    ("ca_file", "-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n",
     "dovetail_redis_ca_file"),
], ids=["absent", "no-pem", "broken"])
def test_wrong_files(new_cluster, ca, tmp_path, setting, content, reason):
    """The services say which file, and mail flows."""
    path = str(tmp_path / "file")
    os.chmod(tmp_path, 0o755)
    if content is not None:
        with open(path, "w") as f:
            f.write(content)
    cluster = start(new_cluster, server(ca, ca.sign("server")), path)
    cluster.expect_errors("dovetail", "service.dovetail", "throttling")
    cluster.a.wait_log("dovetail-queue: Fatal: .*" + reason)
    cluster.a.wait_log(re.escape(path))
    cluster.user().lmtp(mail("flows"))


def test_key_for_all_to_read(new_cluster, ca):
    certificate, key = ca.sign("loose")
    os.chmod(key, 0o644)
    cluster = start(new_cluster, server(ca, ca.sign("server")),
                    ca.certificate, cert_file=certificate, key_file=key)
    cluster.expect_errors("dovetail", "service.dovetail", "throttling")
    cluster.a.wait_log("Fatal: .*can be read by everybody .chmod 600")


def test_no_plain_text(new_cluster, ca):
    """To a server that is not what it should be not a byte of ours goes, and
    never without TLS."""
    got = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                connection.sendall(b"+PONG\r\n")
                try:
                    got.append(connection.recv(4096))
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    cluster = new_cluster(
        redis={"tls": server(ca, ca.sign("server")), "password": "s3cret"},
        start=False, settings=dict(
            SETTINGS, dovetail_redis_ca_file=ca.certificate))
    cluster.expect_errors("redis")
    for node in cluster.nodes:
        node.settings["dovetail_redis"] = "rediss://localhost:%d" % \
            listener.getsockname()[1]
        node.write_conf()
    cluster.start()
    wait_for(lambda: len(got) > 4, "connections")
    cluster.a.wait_log("Error: redis.*TLS failed")
    listener.close()
    # a TLS handshake begins with 0x16 0x03
    assert all(data[:2] == b"\x16\x03" for data in got if data)
    assert not any(b"s3cret" in data for data in got)
