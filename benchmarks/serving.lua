-- wrk's requests: pictures in turn, and every --every-th request hostile; figures as JSON at the end.
-- Arguments: every, the number of pictures, then their paths and those of hostile bodies.
local pictures, hostile, every, sent, bad = {}, {}, 0, 0, 0

local function formatted(path)
   local file = assert(io.open(path, "rb"))
   local body = file:read("*a")
   file:close()
   return wrk.format("POST", nil, {["Content-Type"] = "image/jpeg"}, body)
end

function init(args)
   every = tonumber(args[1])
   for n = 3, #args do
      table.insert(n - 2 <= tonumber(args[2]) and pictures or hostile, formatted(args[n]))
   end
end

function request()
   sent = sent + 1
   if every > 0 and sent % every == 0 then
      bad = bad + 1
      return hostile[bad % #hostile + 1]
   end
   return pictures[sent % #pictures + 1]
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "refused": %d, "broken": %d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
