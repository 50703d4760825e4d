-- What the gateway reads of an inference over HTTP before Triton does: the JSON part of the binary form.
-- Triton 24.10 ends itself over data written as JSON (a shape beyond memory, brackets in brackets), so none passes.
local body = require("body")
local cjson = require("cjson.safe").new()
cjson.decode_max_depth(8)
cjson.decode_invalid_numbers(false)

local LONGEST_HEAD = 16384
local LENGTH_HEADER = "Inference-Header-Content-Length"

local function refuse(message)
    ngx.status = 400
    ngx.header["Content-Type"] = "application/json"
    ngx.print(cjson.encode({ error = message }))
    return ngx.exit(400)
end

-- The length of a list; nil for anything else.
local function count(value)
    if type(value) ~= "table" then
        return nil
    end
    local keys = 0
    for _ in pairs(value) do
        keys = keys + 1
    end
    return keys == #value and keys or nil
end

-- Why an entry of `inputs`, whose data begin at offset, does not pass; or nil and the size of its data.
local function check_input(input, source, offset)
    local name = type(input) == "table" and input.name
    if type(name) ~= "string" or name == "" or #name > body.LONGEST_NAME then
        return "an input has no usable name"
    end
    local where = "input '" .. name .. "': "
    if type(input.datatype) ~= "string" or input.datatype == "" then
        return where .. "datatype is missing"
    end
    if not count(input.shape) then
        return where .. "shape is no list of numbers"
    end
    local fault, elements = body.check_shape(input.shape)
    if fault then
        return where .. fault
    end
    local parameters = input.parameters
    if type(parameters) ~= "table" or not body.whole(parameters.binary_data_size, 0, body.LARGEST_SIDE) then
        return where .. "parameters.binary_data_size is missing; send tensors in the binary form"
    end
    for key in pairs(parameters) do
        if key ~= "binary_data_size" then
            return where .. "parameter '" .. tostring(key):sub(1, body.LONGEST_NAME) .. "' is not accepted here"
        end
    end
    local size = parameters.binary_data_size
    if offset + size > source.size then
        return where .. "binary_data_size is beyond the body"
    end
    fault = input.datatype == "BYTES" and body.check_strings(source, offset, size, elements)
    if fault then
        return where .. fault
    end
    return nil, size
end

local function check_output(output)
    if type(output) ~= "table" or type(output.name) ~= "string" then
        return "an output has no usable name"
    end
    for key, value in pairs(output.parameters or {}) do
        if not (key == "binary_data" and type(value) == "boolean" or key == "classification" and body.whole(value, 0, 1e6)) then
            return "output '" .. output.name:sub(1, body.LONGEST_NAME) .. "': parameter '" .. tostring(key) .. "' is not accepted here"
        end
    end
end

-- Why the JSON part, the first `length` bytes, or a tensor behind it does not pass; or nil.
local function check(source, length)
    local head = source.read(0, length)
    -- Decoders differ over a key that comes twice, so what must not be there is looked for in the text, and no escape may
    -- hide it.
    if head:find("\\", 1, true) then
        return "the JSON part has a backslash; send plain names"
    end
    if head:find('"data"', 1, true) then
        return "the JSON part has data in it; send tensors in the binary form"
    end
    local asked = cjson.decode(head)
    if type(asked) ~= "table" then
        return "the JSON part is not JSON, or not an object"
    end
    local inputs = count(asked.inputs)
    if not inputs or inputs == 0 or inputs > body.MOST_TENSORS then
        return "inputs is no list of 1 to " .. body.MOST_TENSORS .. " tensors"
    end
    local offset = length
    for _, input in ipairs(asked.inputs) do
        local fault, size = check_input(input, source, offset)
        if fault then
            return fault
        end
        offset = offset + size
    end
    if offset ~= source.size then
        return "binary_data_size of all inputs leaves " .. source.size - offset .. " bytes of the body over"
    end
    if asked.outputs ~= nil then
        local outputs = count(asked.outputs)
        if not outputs or outputs > body.MOST_TENSORS then
            return "outputs is no list of at most " .. body.MOST_TENSORS .. " tensors"
        end
        for _, output in ipairs(asked.outputs) do
            local fault = check_output(output)
            if fault then
                return fault
            end
        end
    end
    if asked.id ~= nil and type(asked.id) ~= "string" then
        return "id is no text"
    end
    for key, value in pairs(asked.parameters or {}) do
        if key ~= "binary_data_output" or type(value) ~= "boolean" then
            return "parameter '" .. tostring(key):sub(1, body.LONGEST_NAME) .. "' is not accepted here; leave it out, the client bounds its own time"
        end
    end
end

local given = ngx.req.get_headers()[LENGTH_HEADER]
if given == nil then
    return refuse(LENGTH_HEADER .. " is missing; send tensors in the binary form, not as JSON")
end
local length = type(given) == "string" and given:match("^[1-9]%d?%d?%d?%d?$") and tonumber(given)
if not length or length > LONGEST_HEAD then
    return refuse(LENGTH_HEADER .. " is not a number from 1 to " .. LONGEST_HEAD .. "; send the size of the JSON part")
end
local size = tonumber(ngx.var.content_length) or 0
if length > size then
    return refuse(LENGTH_HEADER .. " is " .. length .. ", above the " .. size .. " bytes of the body")
end
local source = body.open()
local fault = check(source, length)
source.close()
if fault then
    return refuse(fault)
end
