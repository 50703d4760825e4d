-- What both protocols' checks share: a request's body read in places, and the rules for its tensors.
local body = { LONGEST_NAME = 100, MOST_TENSORS = 8, LARGEST_SIDE = 2147483647, MOST_STRINGS = 4096 }

-- The body of this request, which nginx keeps in memory or in a file: its size, and read(offset, count) from 0.
function body.open()
    ngx.req.read_body()
    local data = ngx.req.get_body_data()
    if data then
        return {
            size = #data,
            read = function(offset, count)
                return data:sub(offset + 1, offset + count)
            end,
            close = function() end,
        }
    end
    local path = ngx.req.get_body_file()
    local file = path and io.open(path, "rb")
    if not file then
        return { size = 0, read = function() return "" end, close = function() end }
    end
    return {
        size = file:seek("end"),
        read = function(offset, count)
            file:seek("set", offset)
            return file:read(count) or ""
        end,
        close = function()
            file:close()
        end,
    }
end

function body.whole(value, least, most)
    return type(value) == "number" and value % 1 == 0 and value >= least and value <= most
end

-- Why a shape does not pass, or nil and the number of its elements.
function body.check_shape(shape)
    if #shape > body.MOST_TENSORS then
        return "shape has more than " .. body.MOST_TENSORS .. " sides"
    end
    local elements = 1
    for _, side in ipairs(shape) do
        if not body.whole(side, 1, body.LARGEST_SIDE) then
            return "shape has a number that is not whole, below 1 or too large"
        end
        elements = elements * side
    end
    return nil, elements
end

-- Why the strings of a BYTES tensor do not fill its bytes, or nil. Triton 24.10 finds it too, but then refuses every
-- request of the batch.
function body.check_strings(source, offset, size, expected)
    if expected > body.MOST_STRINGS then
        return "has more than " .. body.MOST_STRINGS .. " strings"
    end
    local place, stop, found = offset, offset + size, 0
    while place < stop do
        local first, second, third, fourth = source.read(place, 4):byte(1, 4)
        if stop - place < 4 or not fourth then
            return "ends within the length of a string"
        end
        place = place + 4 + first + 256 * (second + 256 * (third + 256 * fourth))
        found = found + 1
        if place > stop then
            return "has a string that is longer than its data"
        end
        if found > expected then
            break
        end
    end
    if found ~= expected then
        return "has not the " .. expected .. " strings that its shape says"
    end
end

return body
