"""As much of curl as the documents use, so that their commands run where there is none. Anything else is an error."""

import argparse
import sys

import httpx


def main() -> int:
    parser = argparse.ArgumentParser(prog="curl", allow_abbrev=False)
    parser.add_argument("url")
    parser.add_argument("--silent", action="store_true")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--data-urlencode", action="append", default=[])
    given = parser.parse_args()
    headers = dict(line.split(": ", 1) for line in given.header)
    encoded = [str(httpx.QueryParams([item.split("=", 1)])) for item in given.data_urlencode]
    body = "&".join(given.data + encoded)
    if body:
        headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
    method = "POST" if body else "GET"
    answer = httpx.request(method, given.url, headers=headers, content=body or None, trust_env=False)
    if given.fail and answer.is_error:
        sys.stderr.write(f"curl: (22) the answer was {answer.status_code}\n")
        return 22
    sys.stdout.write(answer.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
