-- One MNIST image a request, as $KIND says: json (FP32), bytes (UINT8 as JSON)
-- or binary (FP32). $IMAGES is the file of the test images.
local ffi = require("ffi")
local kind = os.getenv("KIND") or "json"
local images = assert(io.popen("gzip -dc '" .. assert(os.getenv("IMAGES"), "set IMAGES") .. "'", "r"))
local image = images:read("*a"):sub(17, 16 + 28 * 28) -- after the header
images:close()

-- shortest is the shortest decimal that reads as the same float32, as clients
-- write it.
local function shortest(value)
  local float = ffi.new("float[1]", value)
  for digits = 1, 9 do
    local text = string.format("%." .. digits .. "g", float[0])
    if ffi.new("float[1]", tonumber(text))[0] == float[0] then return text end
  end
end

local values, floats = {}, ffi.new("float[?]", #image)
for i = 1, #image do
  local byte = image:byte(i)
  floats[i - 1] = byte / 255
  values[i] = kind == "bytes" and tostring(byte) or shortest(byte / 255)
end
local tensor = '{"inputs":[{"name":"input","shape":[1,1,28,28],"datatype":"%s",%s}]}'
wrk.method = "POST"
if kind == "binary" then
  local header = tensor:format("FP32", '"parameters":{"binary_data_size":' .. 4 * #image .. "}")
  wrk.body = header .. ffi.string(floats, 4 * #image)
  wrk.headers["Content-Type"] = "application/octet-stream"
  wrk.headers["Inference-Header-Content-Length"] = #header
else
  wrk.body = tensor:format(kind == "bytes" and "UINT8" or "FP32", '"data":[' .. table.concat(values, ",") .. "]")
  wrk.headers["Content-Type"] = "application/json"
end

done = function(summary, latency)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.timeout
  print(string.format("RESULT %d %.0f %.2f %.2f %d %d", summary.requests, summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, e.status, failed))
end
