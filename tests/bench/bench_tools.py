"""What a tool's call costs: the function alone, through its node, and through the manager; and what a start costs.

python tests/bench/bench_tools.py [CALLS]        with tools as processes
"""

import http.client
import json
import logging
import os
import statistics
import sys
import tempfile
import time

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]

import rock_ms  # noqa: E402
import rock_sdk  # noqa: E402

PARAMS = {"instance_id": "123", "period": "1"}


def median_of(calls, function):
    """Seconds that a call takes."""
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def asker(port, path, value, key=None):
    """Asks for the same on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Content-Type": "application/json", **({"Authorization": "Bearer " + key} if key else {})}

    def ask():
        connection.request("POST", path, json.dumps(value), headers)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body

    return ask


def main():
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    logger = logging.Logger("bench")
    with tempfile.TemporaryDirectory() as directory:
        settings = rock_sdk.ManagerSettings(runtime="process", port=0, max_nodes=40)
        server = rock_sdk.tool_manager_server(settings, directory, logger)
        server.start()
        try:
            url = "http://127.0.0.1:%d" % server.http.port
            began = time.perf_counter()
            rock_sdk.ToolServiceProxy("RenewInstance", tool_service_manager_url=url)
            first = time.perf_counter() - began
            began = time.perf_counter()
            for number in range(30):
                create = {"tool_name": "RenewInstance", "tenant_id": "t%d" % number}
                asker(server.http.port, "/create_tool_service", create)()
            for number in range(30):
                tenant = "t%d" % number
                rock_sdk.ToolServiceProxy("RenewInstance", tenant_id=tenant, tool_service_manager_url=url)
            thirty = time.perf_counter() - began
            (node,) = rock_sdk.ToolRegistry(os.path.join(directory, rock_sdk.REGISTRY_NAME)).nodes("default")
            tool = rock_ms.load_tool("RenewInstance", None, {})
            alone = median_of(calls, lambda: tool.run(*tool.check(PARAMS), {}))
            by_node = median_of(calls, asker(node.port, "/execute_tool", {"params": PARAMS}, node.api_key))
            call = {"tool_name": "RenewInstance", "params": PARAMS}
            by_manager = median_of(calls, asker(server.http.port, "/execute_tool", call))
        finally:
            server.stop()
    shown = (1000 * alone, 1000 * by_node, 1000 * by_manager, by_manager / by_node, first, thirty)
    print("alone %.2f ms  node %.2f ms  manager %.2f ms  ratio %.1f  a tool starts in %.2f s, 30 in %.1f s" % shown)


if __name__ == "__main__":
    main()
