-- One MNIST image a request: json (FP32), bytes (UINT8 as JSON) or binary.
-- The body is in the file $BODY; the length of a binary one's JSON in $HEADER.
local file = assert(io.open(os.getenv("BODY"), "rb"))
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
wrk.headers["Content-Type"] = "application/json"
if (os.getenv("HEADER") or "") ~= "" then
  wrk.headers["Content-Type"] = "application/octet-stream"
  wrk.headers["Inference-Header-Content-Length"] = os.getenv("HEADER")
end

done = function(summary, latency, requests)
  local e = summary.errors
  print(string.format("%.0f requests/s, p50 %.2f ms, p99 %.2f ms, %d not 200, %d failed",
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.status, e.connect + e.read + e.write + e.timeout))
end
