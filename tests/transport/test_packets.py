"""corra's packet layer against paramiko's, byte for byte, however the bytes are cut on their way;
and against a peer that means harm.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, strategies as st
from paramiko import Message, SSHException
from paramiko.packet import NeedRekeyException, Packetizer

from corra.transport.fabric.packets import PACKET_MAX, Data, Packets
from properties import PROPERTY

KEY, IV = bytes(range(16)), bytes(range(12))
CHANNEL = 7


class Pieces(socket.socket):
    """A connection that hands out its data in pieces of the given sizes, then of random ones."""

    sizes: Iterator[int] = iter(())

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0, /) -> int:
        most = next(self.sizes, 1 << 18)
        return super().recv_into(memoryview(buffer)[:most], size, flags)


def pair(packets: type = Packets, deliver: Any = None) -> tuple[Any, Packetizer, socket.socket]:
    """Return (corra's end, paramiko's end, the latter's socket), connected and keyed."""
    left, right = socket.socketpair()
    ours = packets(Pieces(fileno=left.detach()), deliver or (lambda *_: False))
    theirs = Packetizer(right)
    for each in (ours, theirs):
        for cipher, iv in (
            (each.set_outbound_cipher, "iv_out"),
            (each.set_inbound_cipher, "iv_in"),
        ):
            cipher(
                block_engine=AESGCM(KEY),
                block_size=16,
                mac_engine=None,
                mac_size=16,
                mac_key=None,
                etm=False,
                aead=True,
                **{iv: IV},
            )
    return ours, theirs, right


def message(kind: int, body: bytes) -> Message:
    made = Message()
    made.add_byte(bytes([kind]))
    made.add_bytes(body)
    return made


def channel_data(data: bytes, channel: int = CHANNEL) -> Message:
    return message(94, struct.pack(">II", channel, len(data)) + data)


bodies = st.binary(max_size=70) | st.integers(1, 40_000).map(os.urandom)


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from([2, 80, 93, 94, 98]), bodies), max_size=6),
    st.lists(st.integers(1, 5000), max_size=40),
)
def test_what_paramiko_sends_is_read_however_it_is_cut(sent, sizes):
    taken = bytearray()

    def deliver(channel, data):
        assert channel == CHANNEL
        taken.extend(data)
        return True

    ours, theirs, peer = pair(deliver=deliver)
    ours._carrier.sizes = iter(sizes)
    others = [(kind, body) for kind, body in sent if kind != 94]
    for kind, body in [*sent, (1, b"end")]:
        theirs.send_message(channel_data(body) if kind == 94 else message(kind, body))
    assert [ours.read_message()[1].asbytes() for _ in others] == [body for _, body in others]
    assert ours.read_message()[0] == 1
    assert bytes(taken) == b"".join(body for kind, body in sent if kind == 94)
    ours.close()
    peer.close()


@PROPERTY
@given(st.lists(bodies, min_size=1, max_size=5), st.integers(1, 32768))
def test_what_we_send_is_what_paramiko_reads(sent, step):
    step = max(step, max(map(len, sent)) // 50)
    ours, theirs, peer = pair()
    for data in sent:
        ours.send_message(Data(CHANNEL, memoryview(data), step))
        ours.send_message(message(98, data[:100]))
        came = b""
        while True:
            kind, got = theirs.read_message()
            if kind == 98:
                assert got.asbytes() == data[:100]
                break
            assert (kind, got.get_int()) == (94, CHANNEL)
            piece = got.get_binary()
            assert 0 < len(piece) <= step
            came += piece
        assert came == data
    ours.close()
    peer.close()


def test_without_keys_and_with_any_other_cipher_all_is_paramikos():
    left, right = socket.socketpair()
    ours, theirs = Packets(left, lambda *_: True), Packetizer(right)
    right.sendall(b"SSH-2.0-x\r\n")
    theirs.send_message(channel_data(b"abc"))
    assert ours.readline(5) == "SSH-2.0-x"
    assert ours.read_message()[0] == 94
    ours.send_message(Data(CHANNEL, memoryview(b"abcdef"), 4))
    assert [theirs.read_message()[1].asbytes()[8:] for _ in range(2)] == [b"abcd", b"ef"]
    ours.close()
    right.close()


def test_a_channel_whose_bytes_nobody_takes_is_paramikos():
    ours, theirs, peer = pair()
    theirs.send_message(channel_data(b"abc"))
    kind, got = ours.read_message()
    assert (kind, got.get_int(), got.get_binary(), got.seqno) == (94, CHANNEL, b"abc", 0)
    theirs.send_message(message(2, b""))
    assert ours.read_message()[1].seqno == 1
    ours.close()
    peer.close()


@pytest.mark.parametrize("size", [0, 15, 17, PACKET_MAX + 16, 1 << 31, (1 << 32) - 16])
def test_a_length_that_no_packet_has_ends_the_connection_before_a_byte_is_kept(size):
    ours, _, peer = pair()
    peer.sendall(struct.pack(">I", size) + bytes(64))
    with pytest.raises(SSHException, match="a packet of"):
        ours.read_message()
    assert len(ours._buffer) <= 256 << 10
    ours.close()
    peer.close()


@pytest.mark.parametrize("at", [4, 20, -1])
def test_a_bit_that_was_turned_on_the_way_ends_the_connection(at):
    ours, theirs, peer = pair()
    sealed = bytearray(b"".join(ours._sealed(ours._out, b"\x05" + bytes(10) + bytes(5))))
    sealed[at] ^= 1
    peer.sendall(sealed)
    with pytest.raises(SSHException, match="changed on its way"):
        ours.read_message()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("plain", [b"\x0f" + bytes(15), b"\xff" + bytes(15), b"\x10" + bytes(15)])
def test_a_packet_that_is_all_padding_ends_the_connection(plain):
    ours, _, peer = pair()
    peer.sendall(struct.pack(">I", 16) + AESGCM(KEY).encrypt(IV, plain, struct.pack(">I", 16)))
    with pytest.raises(SSHException, match="padding"):
        ours.read_message()
    ours.close()
    peer.close()


def test_a_channels_length_that_is_more_than_the_packet_is_not_delivered():
    ours, theirs, peer = pair(deliver=lambda *_: True)
    theirs.send_message(message(94, struct.pack(">II", CHANNEL, 1000) + b"abc"))
    assert ours.read_message()[0] == 94
    ours.close()
    peer.close()


def test_keys_are_asked_for_anew_after_so_many_bytes_and_a_host_that_exchanges_none_is_left(
    monkeypatch,
):
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", 100_000)
    monkeypatch.setattr(Packetizer, "REKEY_BYTES_OVERFLOW_MAX", 100_000)
    ours, theirs, peer = pair(deliver=lambda *_: True)
    for _ in range(4):
        theirs.send_message(channel_data(bytes(30_000)))
    with pytest.raises(NeedRekeyException):
        ours.read_message()
    assert ours.need_rekey()
    with pytest.raises(SSHException, match="exchanges no keys"):
        for _ in range(5):
            theirs.send_message(channel_data(bytes(30_000)))
            with pytest.raises(NeedRekeyException):
                ours.read_message()
    ours.close()
    peer.close()


def test_a_greeting_without_an_end_is_bounded():
    left, right = socket.socketpair()
    ours = Packets(left, lambda *_: True)
    right.setblocking(False)
    left.settimeout(0.1)

    def flood() -> None:
        try:
            while True:
                right.send(bytes(65536))
        except BlockingIOError:
            pass

    with pytest.raises(EOFError):
        while True:
            flood()
            with pytest.raises(TimeoutError):
                ours.readline(0)
    assert len(ours._buffer) <= PACKET_MAX + 20
    ours.close()
    right.close()
