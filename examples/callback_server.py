# python3 callback_server.py PORT DIRECTORY
"""Keep in DIRECTORY what runs post to http://127.0.0.1:PORT/PROG-ID: streams and end."""

import http.server
import re
import sys
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = re.fullmatch(r"/([a-z0-9][a-z0-9._-]*)/(completed|output/[a-z]+)", self.path)
        code, offset = 404, None
        if path and path[2] == "completed":
            code = 200
            Path(sys.argv[2], f"{path[1]}.json").write_bytes(data)
        elif path:
            code, offset = self.output(f"{path[1]}.{path[2][7:]}", data)
        self.send_response(code)
        if offset is not None:
            self.send_header("Upload-Offset", str(offset))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def output(self, name, data):
        """Put `data` where it belongs; bytes that come twice are the same bytes."""
        Path(sys.argv[2], name).touch()
        with Path(sys.argv[2], name).open("r+b") as file:
            size, begin = file.seek(0, 2), int(self.headers["Upload-Offset"])
            if begin > size and "Upload-Gap" not in self.headers:
                return 409, size  # something lacks: the courier goes on from `size`
            file.truncate(max(size, begin))  # a gap is filled with zeros
            file.seek(begin)
            file.write(data)
            return 200, max(size, begin + len(data))


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
