-- Convert Triton's HTTP response into the gRPC response to an inference: call head(), then body() for each piece.
-- The variables grpc_status and grpc_message become the trailers.
local cjson = require("cjson.safe")

local response = {}
local LENGTH_HEADER = "Inference-Header-Content-Length"
-- gRPC status by Triton's HTTP status: INVALID_ARGUMENT, NOT_FOUND, INTERNAL, UNIMPLEMENTED, UNAVAILABLE.
local STATUS = { [400] = 3, [404] = 5, [500] = 13, [501] = 12, [503] = 14 }
local UNKNOWN, MOST_MESSAGE = 2, 1000

local function varint(value)
    local bytes = ""
    while value > 127 do
        bytes, value = bytes .. string.char(value % 128 + 128), math.floor(value / 128)
    end
    return bytes .. string.char(value)
end

local function field(number, data)
    return string.char(number * 8 + 2) .. varint(#data) .. data
end

-- Encode a ModelInferResponse with gRPC's frame. result: Triton's JSON object, whose outputs are all binary. data: the
-- bytes of the outputs, concatenated.
local function message(result, data)
    local parts, raw, offset = {}, {}, 1
    for _, output in ipairs(result.outputs) do
        local shape, size = {}, output.parameters.binary_data_size
        for index, side in ipairs(output.shape) do
            shape[index] = varint(side)
        end
        table.insert(parts, field(5, field(1, output.name) .. field(2, output.datatype) .. field(3, table.concat(shape))))
        table.insert(raw, field(6, data:sub(offset, offset + size - 1)))
        offset = offset + size
    end
    local head = field(1, result.model_name) .. field(2, result.model_version) .. field(3, result.id or "")
    local whole = head .. table.concat(parts) .. table.concat(raw)
    local size = #whole
    local length = string.char(math.floor(size / 16777216), math.floor(size / 65536) % 256, math.floor(size / 256) % 256, size % 256)
    return "\0" .. length .. whole
end

function response.head()
    if ngx.var.grpc_status ~= "" then -- rejected by the gateway
        return
    end
    ngx.ctx.received = { status = ngx.status, length = tonumber(ngx.header[LENGTH_HEADER]) }
    ngx.status = 200
    ngx.header[LENGTH_HEADER] = nil
    ngx.header.content_length = nil
    ngx.header.content_type = "application/grpc"
end

function response.body()
    local received = ngx.ctx.received
    if not received then
        return
    end
    table.insert(received, ngx.arg[1])
    if not ngx.arg[2] then
        ngx.arg[1] = nil
        return
    end
    local data = table.concat(received)
    local length = received.length or #data
    local result = cjson.decode(data:sub(1, length))
    if received.status == 200 and result then
        ngx.var.grpc_status, ngx.arg[1] = 0, message(result, data:sub(length + 1))
        return
    end
    ngx.var.grpc_status = STATUS[received.status] or UNKNOWN
    ngx.var.grpc_message = ngx.escape_uri(tostring(result and result.error or data):sub(1, MOST_MESSAGE))
    ngx.arg[1] = nil
end

return response
